"""The words in which a step is foretold: what is assumed, how a model is spread, what the parts of a step are."""

from dataclasses import dataclass, fields
from typing import Literal

Recompute = Literal["none", "act", "selective", "moe", "block"]
"""`act` and `moe` are Megatron's, in published figures: activation functions, and layers of experts."""
Software = Literal["fused", "compiled", "eager"]


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What data sheets do not say. launch/PREDICTION.md tells where each comes from; the last three are fitted."""

    product_efficiency: float = 0.70
    """Of peak, in large bf16 products."""
    grouped_efficiency: float = 0.80
    """Of a dense product's speed, in grouped products with full tiles."""
    attention_efficiency: float = 0.50
    """Of peak, in fused attention, forward and backward together."""
    memory_efficiency: float = 0.80
    """Of memory bandwidth, in kernels that only move data."""
    link_efficiency: float = 0.75
    """Of the bandwidth inside a node."""
    network_efficiency: float = 0.85
    """Of the bandwidth between nodes."""
    layer_seconds: float = 250e-6
    """Launches and waits of one layer, for each forward; a backward has two of them."""
    hidden_reduction: float = 0.8
    """Share of ZeRO's collectives that can hide under the backward."""
    hidden_alltoall: float = 0.29
    """Share of all-to-alls that hides where they are overlapped with another micro-batch."""
    eager: float = 6.8
    """Bytes moved outside products, and launches, over those of a fused stack, if each operation is its own kernel."""
    compiled: float = 6.4
    """The same where torch.compile fuses what lies between products."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model is spread and fed. `micro_batch` counts sequences of one data-parallel replica."""

    gpus: int
    sequence_length: int
    micro_batch: int
    global_batch: int
    zero_stage: int = 1
    expert: int = 1
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    recompute: Recompute = "none"
    extra_forwards: float = 0.0
    """Forwards a micro-batch has besides the one its backward needs: 1 with `two_pass`."""
    tiled_head: bool = False
    """Whether the backward makes the head's logits again (moe/loss_head.py)."""
    one_copy_a_node: bool = False
    """Whether the dispatcher sends a token once to each node."""
    overlap: bool = False
    """Whether all-to-alls run beside another micro-batch's products."""
    software: Software = "fused"
    """What the operations between products are."""
    gradient_bytes: int = 4
    gpus_per_node: int = 8
    max_violation: float = 0.0

    @property
    def replicas(self) -> int:
        """Data-parallel replicas."""
        return self.gpus // (self.tensor * self.pipeline * self.context)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one replica in a step."""
        return self.global_batch // (self.replicas * self.micro_batch)

    @property
    def tokens(self) -> float:
        """Tokens of a micro-batch that one GPU holds."""
        return self.micro_batch * self.sequence_length / (self.tensor * self.context)


@dataclass(frozen=True)
class Parts:
    """Seconds of one step on the busiest GPU."""

    products: float
    experts: float
    attention: float
    traffic: float
    alltoall: float
    tensor: float
    bubble: float
    reduction: float
    optimizer: float
    launches: float

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True)
class Prediction:
    """A foretold step."""

    parts: Parts
    tokens: int
    flops_per_token: float
    gpus: int
    peak_flops: float

    @property
    def seconds(self) -> float:
        return self.parts.total

    @property
    def tokens_per_gpu(self) -> float:
        """Tokens a second on each GPU."""
        return self.tokens / self.seconds / self.gpus

    @property
    def flops_per_gpu(self) -> float:
        """Model FLOP/s of each GPU, causal attention counted once."""
        return self.tokens_per_gpu * self.flops_per_token

    @property
    def mfu(self) -> float:
        return self.flops_per_gpu / self.peak_flops
