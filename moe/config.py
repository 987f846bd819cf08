"""The shape of the decoder, and what makes a shape impossible."""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from moe.latent import LatentConfig

_GROUPED_MM_MULTIPLE = 8  # grouped_mm wants strides of 16 bytes: 8 elements in bf16


@dataclass(frozen=True, kw_only=True)
class AuxLossConfig:
    """Coefficients of the router's auxiliary losses (moe/aux_losses.py), 0 for none. Any may join any bias rule."""

    switch: float = 0.0
    """Balance within a micro-batch; 0.01 is customary."""
    sequence: float = 0.0
    """Balance within a sequence; DeepSeek-V3 adds 1e-4 to the bias."""
    global_batch: float = 0.0
    """Balance over all ranks and micro-batches of the step."""
    z: float = 0.0
    """Size of the router's logits; 1e-3 is customary."""

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        return [
            f"{name}: {value} must be finite and not negative"
            for name, value in asdict(self).items()
            if not (math.isfinite(value) and value >= 0)
        ]

    @property
    def any(self) -> bool:
        """Whether there is anything to add to the loss."""
        return any(asdict(self).values())


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder whose first layers are dense and whose others are mixtures of experts."""

    hidden_size: int = 1024
    """Width of the residual stream (D)."""
    num_layers: int = 10
    """Blocks, dense and sparse together."""
    num_dense_layers: int = 1
    """First blocks that have a dense feed-forward instead of experts."""
    layer_experts: tuple[int, ...] = ()
    """Routed experts of each block, 0 for a dense one, where blocks differ; empty: num_experts in all sparse ones."""
    dense_intermediate_size: int = 2816
    """Width of the dense feed-forward."""
    num_heads: int = 16
    """Query heads."""
    num_kv_heads: int = 16
    """Key and value heads; fewer than num_heads is grouped-query attention."""
    head_dim: int = 0
    """Width of a head; 0 means hidden_size / num_heads."""
    attention: Literal["gqa", "mla"] = "gqa"
    """Grouped-query attention, or multi-head latent attention with the widths in `mla`."""
    mla: LatentConfig = field(default_factory=LatentConfig)

    num_experts: int = 64
    """Routed experts a layer (E); with layer_experts, of the multi-token-prediction block."""
    top_k: int = 6
    """Routed experts a token uses (K)."""
    expert_intermediate_size: int = 512
    """Width of one routed expert (F)."""
    num_shared_experts: int = 2
    """Experts every token uses, each as wide as a routed one."""
    router_score: Literal["sigmoid", "softmax", "sqrtsoftplus"] = "sigmoid"
    """Router score function; always in float32."""
    normalize_gates: bool = True
    """Divide the chosen scores by their sum."""
    routed_scale: float = 1.0
    """Factor on the output of the routed experts."""
    num_groups: int = 1
    """Groups of experts for group-limited routing (DeepSeek-V3); 1 turns it off."""
    top_groups: int = 1
    """Groups a token may choose experts from."""
    router_jitter: float = 0.0
    """Half-width of multiplicative noise on the router's input in training."""
    capacity_factor: float = 0.0
    """Tokens of a micro-batch an expert takes at most, relative to its even share; 0 drops none. Padding is none."""
    drop_by: Literal["score", "position"] = "score"
    """Which tokens an expert over its capacity keeps: those with the largest gates, or the first."""
    uniform_routing: bool = False
    """Deal tokens to experts in turn whatever their scores, for benchmarks."""
    aux_loss: AuxLossConfig = field(default_factory=AuxLossConfig)

    document_mask: bool = False
    """Keep documents apart: attention, positions and every target stay inside one; off, a row is one text."""
    qk_norm: bool = False
    """RMSNorm on each query and key head."""
    attention_bias: bool = False
    """Bias on the query, key and value projections."""
    partial_rotary: float = 1.0
    """Share of each head that rotary positions turn."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm."""
    tie_embeddings: bool = False
    """Use the embedding matrix as the output head."""
    loss_tile: int = 0
    """Entries of the vocabulary whose logits exist at once in the loss (moe/loss_head.py); 0 chooses by memory, and
    the size of the vocabulary or more makes it the plain head."""
    mtp_weight: float = 0.0
    """Weight of a multi-token-prediction block that predicts the token after the next (DeepSeek-V3); 0 has none."""
    init_std: float = 0.02
    """Standard deviation of initial weights; projections into the residual stream are divided by sqrt(2 layers)."""
    dropout: float = 0.0
    """Dropout on the output of attention and feed-forward."""
    activation_recompute: Literal["none", "selective", "block"] = "none"
    """What the backward makes again instead of keeping it, bit for bit: nothing; norms, activations and copies of
    tokens (`selective`: no product is run twice); or whole blocks."""
    compile: bool = False
    """Fuse norms, rotary positions, residual sums and SwiGLU by torch.compile (moe/compiled.py). The first steps of a
    process compile, half a minute on a CPU; results differ by rounding, and dropout draws other masks."""

    @property
    def head_size(self) -> int:
        """Width of a head with the default resolved."""
        return self.head_dim or self.hidden_size // max(self.num_heads, 1)

    @property
    def rotary_size(self) -> int:
        """Elements of a head that are rotated; even."""
        if self.attention == "mla":
            return self.mla.qk_rope_head_dim
        return int(self.head_size * self.partial_rotary) // 2 * 2

    @property
    def block_experts(self) -> tuple[int, ...]:
        """Routed experts of every block, 0 for a dense one; the block of multi-token prediction comes last."""
        sparse = self.num_layers - self.num_dense_layers
        blocks = self.layer_experts or (0,) * self.num_dense_layers + (self.num_experts,) * sparse
        return tuple(blocks) + (self.num_experts,) * self.has_mtp

    @property
    def num_moe_layers(self) -> int:
        """Blocks with routed experts (L), that of multi-token prediction included."""
        return sum(experts > 0 for experts in self.block_experts)

    def with_experts(self, num_experts: int) -> "ModelConfig":
        """The same shape as one block with `num_experts` sees it."""
        return replace(self, num_experts=num_experts, layer_experts=())

    @property
    def has_mtp(self) -> bool:
        """Whether there is a multi-token-prediction block."""
        return self.mtp_weight > 0

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        found = []
        for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                found.append(f"{name}: {getattr(self, name)} must be at least 1")
        for name in ("num_dense_layers", "head_dim", "num_shared_experts", "loss_tile"):
            if getattr(self, name) < 0:
                found.append(f"{name}: {getattr(self, name)} is negative")
        if found:
            return found
        found += self._latent_problems() if self.attention == "mla" else self._grouped_problems()
        if self.num_dense_layers > self.num_layers:
            found.append(f"num_dense_layers: {self.num_dense_layers} is more than num_layers ({self.num_layers})")
        if self.layer_experts:
            found += self._layer_problems()
        if 0 in self.block_experts and self.dense_intermediate_size < 1:
            found.append(f"dense_intermediate_size: {self.dense_intermediate_size} must be at least 1")
        for name in ("rope_theta", "norm_eps", "init_std", "routed_scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                found.append(f"{name}: {value} must be finite and positive")
        if not (math.isfinite(self.mtp_weight) and self.mtp_weight >= 0):
            found.append(f"mtp_weight: {self.mtp_weight} must be finite and not negative; 0 has no such block")
        if not 0 <= self.dropout < 1:
            found.append(f"dropout: {self.dropout} must be in [0, 1)")
        if self.compile and self.activation_recompute == "selective":
            found.append(
                "activation_recompute: selective remakes insides of what compile fuses, which keeps little of them "
                "anyway; use none or block, or set compile to false"
            )
        sparse = any(self.layer_experts) if self.layer_experts else self.num_dense_layers < self.num_layers
        return found + (self._expert_problems() if sparse or self.has_mtp else [])

    def training_problems(self) -> list[str]:
        """Why a model that can be built and evaluated cannot be trained, one line each."""
        if self.top_k == 1 and self.normalize_gates and max(self.block_experts, default=0) > 1:
            return [
                "top_k: 1 with normalize_gates makes every gate 1 whatever the score, so the loss cannot teach the "
                "router anything; set normalize_gates to false, or top_k to 2 or more"
            ]
        if any(self.block_experts):
            return []
        unread = {"aux_loss": self.aux_loss.any} | {
            name: getattr(self, name) for name in ("router_jitter", "capacity_factor", "uniform_routing")
        }
        return [
            f"{name}: is of routers, and no layer has experts; remove it" for name, is_set in unread.items() if is_set
        ]

    def _grouped_problems(self) -> list[str]:
        """Why grouped-query attention cannot have this shape."""
        found = []
        if not self.head_dim and self.hidden_size % self.num_heads:
            found.append(
                f"num_heads: {self.num_heads} does not divide hidden_size ({self.hidden_size}); or set head_dim"
            )
        if self.num_heads % self.num_kv_heads:
            found.append(f"num_kv_heads: {self.num_kv_heads} does not divide num_heads ({self.num_heads})")
        if self.head_size % 2:
            found.append(f"head_dim: {self.head_size} is odd; rotary positions need an even width")
        if not 0 < self.partial_rotary <= 1:
            found.append(f"partial_rotary: {self.partial_rotary} must be in (0, 1]")
        elif self.rotary_size < 2:
            found.append(f"partial_rotary: {self.partial_rotary} turns nothing in a head of width {self.head_size}")
        if self.mla.is_set:
            found.append("mla: is not read with attention gqa; set attention to mla or remove it")
        return found

    def _latent_problems(self) -> list[str]:
        """Why multi-head latent attention cannot have this shape, and what it does not read."""
        found = [f"mla.{line}" for line in self.mla.problems()]
        if self.num_kv_heads != self.num_heads:
            found.append(
                f"num_kv_heads: {self.num_kv_heads}, but with attention mla each head has its own keys and values; "
                f"set it to num_heads ({self.num_heads})"
            )
        for name, unset in (("head_dim", 0), ("partial_rotary", 1.0), ("qk_norm", False), ("attention_bias", False)):
            if getattr(self, name) != unset:
                found.append(f"{name}: is not read with attention mla; remove it")
        return found

    def _layer_problems(self) -> list[str]:
        """Why the experts of single blocks contradict each other or the other fields."""
        found = []
        if len(self.layer_experts) != self.num_layers:
            found.append(
                f"layer_experts: has {len(self.layer_experts)} entries for num_layers {self.num_layers}; give every "
                "block one, 0 for a dense block"
            )
        if any(experts < 0 for experts in self.layer_experts):
            found.append(f"layer_experts: {min(self.layer_experts)} is negative; 0 makes a block dense")
        if any(self.layer_experts[: self.num_dense_layers]):
            found.append(
                f"layer_experts: has experts among the first num_dense_layers ({self.num_dense_layers}) blocks; "
                "lower num_dense_layers"
            )
        if any(self.layer_experts) and self.num_experts not in self.block_experts:
            found.append(
                f"num_experts: {self.num_experts} is that of no block in layer_experts; set it to one that is, "
                "or remove layer_experts"
            )
        return found

    def _expert_problems(self) -> list[str]:
        if self.num_experts < 1:
            return [f"num_experts: {self.num_experts} must be at least 1 (all-dense: num_dense_layers = num_layers)"]
        found = []
        name = "an entry of layer_experts" if self.layer_experts else "num_experts"
        for experts in sorted({experts for experts in self.block_experts if experts > 0}):
            found += self.with_experts(experts)._selection_problems(name)
        for name in ("hidden_size", "expert_intermediate_size"):
            value = getattr(self, name)
            if value < 1 or value % _GROUPED_MM_MULTIPLE:
                found.append(
                    f"{name}: {value} must be a positive multiple of {_GROUPED_MM_MULTIPLE} for grouped products"
                )
        if self.num_groups > 0 and not 1 <= self.top_groups <= self.num_groups:
            found.append(f"top_groups: {self.top_groups} must be between 1 and num_groups ({self.num_groups})")
        found += [f"aux_loss.{line}" for line in self.aux_loss.problems()]
        if not 0 <= self.router_jitter < 1:
            found.append(f"router_jitter: {self.router_jitter} must be in [0, 1)")
        if not (math.isfinite(self.capacity_factor) and self.capacity_factor >= 0):
            found.append(f"capacity_factor: {self.capacity_factor} must be finite and not negative; 0 drops none")
        if self.drop_by == "position" and not self.capacity_factor:
            found.append("drop_by: nothing is dropped with capacity_factor 0; set that too or remove this")
        if self.uniform_routing and self.num_groups > 1:
            found.append("uniform_routing: ignores groups; set num_groups to 1")
        return found

    def _selection_problems(self, name: str) -> list[str]:
        """Why K of `num_experts` experts cannot be chosen; `name`: where that number stands."""
        found = []
        if not 1 <= self.top_k <= self.num_experts:
            found.append(f"top_k: {self.top_k} must be between 1 and {name} ({self.num_experts})")
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            found.append(f"num_groups: {self.num_groups} does not divide {name} ({self.num_experts})")
            return found
        size = self.num_experts // self.num_groups
        if 1 <= self.top_groups <= self.num_groups and self.num_groups > 1 and self.top_k > size * self.top_groups:
            found.append(
                f"top_k: {self.top_k} experts cannot come from {self.top_groups} groups of {size}; raise top_groups"
            )
        if self.num_groups > 1 and size < 2:
            found.append(
                f"num_groups: {self.num_groups} leaves groups of one expert; a group is scored by its best two"
            )
        return found
