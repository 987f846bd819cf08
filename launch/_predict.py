"""Step time and MFU of a training step, foretold from shapes: pure arithmetic, nothing is run.

The step of the busiest GPU is a sum of `Parts`, each the larger of its arithmetic and its bytes over what the hardware
gives, times an efficiency that `Constants` names:

- dense products: projections of attention, dense and shared feed-forwards, router, head;
- grouped products of experts: m rows fill m / (m + 64) of tiles of 128 rows, and every pass reads all weights, however
  few rows there are: the roofline that fine-grained experts fall under;
- attention scores and values, causal; their backward is 2.5 forwards, for the scores are made again;
- traffic of everything else: norms, residuals, rotary positions, permutation, activations, softmax of the head;
- all-to-alls: a token goes to each rank that holds one of its K experts; across nodes once a node if the dispatcher
  forwards inside the node (DeepEP), else once an expert;
- gathers and scatters of tensor parallelism, the bubble of a pipeline, ZeRO's collectives as far as no backward hides
  them, the optimizer's pass over its shard, and launches: a fixed time for each layer and pass.

The busiest rank sets the pace: its experts' work and messages are 1 + v times the mean. With MaxVio V over the experts
of a layer and e of them on a rank v = V / sqrt(e), as if loads were independent; 0 where a rank holds all experts.

This project spreads by ZeRO and experts. Tensor, pipeline and context parallelism are here because published figures
use them: one formula must explain those too (launch/_published.py). Constants and errors: launch/PREDICTION.md.
"""

import math
from dataclasses import dataclass

from launch._hardware import Gpu, Network
from launch._step_terms import Constants, Layout, Parts, Prediction
from moe.arithmetic import count_parameters, flops_per_token
from moe.config import ModelConfig

BYTES = 2  # bf16
TILE_HALF = 64  # half the 128 rows of a tile: what an expert wastes on average


def predict(
    model: ModelConfig, vocab_size: int, layout: Layout, gpu: Gpu, network: Network, constants: Constants
) -> Prediction:
    """The step of `model` in `layout`."""
    step = _Step(model, vocab_size, layout, gpu, network, constants)
    return Prediction(
        step.parts(),
        layout.global_batch * layout.sequence_length,
        flops_per_token(model, vocab_size, layout.sequence_length),
        layout.gpus,
        gpu.peak_flops,
    )


@dataclass(frozen=True)
class _Step:
    model: ModelConfig
    vocab_size: int
    layout: Layout
    gpu: Gpu
    network: Network
    constants: Constants

    @property
    def sparse(self) -> list[int]:
        """Experts of each sparse block."""
        return [experts for experts in self.model.block_experts if experts]

    def parts(self) -> Parts:
        """Every part, for all micro-batches of the step."""
        layout, constants = self.layout, self.constants
        # Forwards of the body and of the experts for each backward; the head is made again only where it is tiled.
        body = 1 + layout.extra_forwards + (layout.recompute == "block")
        expert = body + (layout.recompute == "moe")
        # Norms, activations and copies are about half of what is moved outside products, and of the kernels.
        light = expert + 0.5 * (layout.recompute in ("act", "selective"))
        launched = body + 0.5 * (layout.recompute == "selective")
        blocks = len(self.model.block_experts)
        runs, mine = layout.micro_batches, math.ceil(blocks / layout.pipeline) / blocks
        hidden = constants.hidden_alltoall * layout.overlap
        head_products, head_traffic = self._head(1 + layout.extra_forwards + layout.tiled_head)
        share = 1.0 if layout.pipeline == 1 else 0.0  # the head has one of a pipeline's stages, of which it is a part
        products = runs * (mine * self._products(body) + share * head_products)
        experts = runs * mine * self._experts(expert) * self.busiest
        attention = runs * mine * self._attention(body)
        traffic = runs * (mine * self._traffic(light) + share * head_traffic)
        alltoall = runs * mine * self._alltoall(expert) * self.busiest * (1 - hidden)
        tensor = runs * mine * self._tensor(body)
        launches = runs * mine * blocks * (launched + 2) * constants.layer_seconds * self.unfused
        busy = products + experts + attention + traffic + alltoall + tensor + launches
        bubble = busy * (layout.pipeline - 1) / (layout.virtual * max(runs, 1))
        if layout.pipeline > 1:
            # The stage of the head has one block less than the others; if it is slower all wait for it.
            block = busy / (mine * blocks)
            bubble += max(runs * (head_products + head_traffic) - block, 0.0)
        backward = busy / max(runs, 1) * 2 / (body + 2)  # of one micro-batch
        return Parts(
            products, experts, attention, traffic, alltoall, tensor, bubble,
            self._reduction(backward, busy), self._optimizer(), launches,
        )  # fmt: skip

    @property
    def unfused(self) -> float:
        """Kernels, and bytes they move between them, over those of a stack that fuses."""
        return {"fused": 1.0, "compiled": self.constants.compiled, "eager": self.constants.eager}[self.layout.software]

    @property
    def busiest(self) -> float:
        """Expert work of the busiest rank over the mean."""
        layout = self.layout
        if layout.expert == 1 or not self.sparse:
            return 1.0
        local = sum(self.sparse) / len(self.sparse) / layout.expert
        return min(1 + layout.max_violation / math.sqrt(max(local, 1)), layout.expert)

    def _matmul(self, parameters: float, tokens: float, forwards: float, efficiency: float) -> float:
        """Forwards and the two products of the backward: the slower of arithmetic and reading weights each time."""
        work = 2 * parameters * tokens / (self.gpu.peak_flops * efficiency)
        read = BYTES * parameters / (self.gpu.memory_bandwidth * self.constants.memory_efficiency)
        return (forwards + 2) * max(work, read)

    def _products(self, forwards: float) -> float:
        total, layout = count_parameters(self.model, self.vocab_size).total, self.layout
        names = ("attention", "dense mlp", "shared experts", "router", "next token")
        parameters = sum(total[name] for name in names) / layout.tensor
        # A GPU's share of the weights meets all tokens of its tensor-parallel group.
        return self._matmul(parameters, layout.tokens * layout.tensor, forwards, self.constants.product_efficiency)

    def _head(self, forwards: float) -> tuple[float, float]:
        """Products of the output head, and traffic: float32 logits written, read for the softmax, their gradient."""
        layout, heads = self.layout, 1 + self.model.has_mtp
        parameters = self.vocab_size * self.model.hidden_size / layout.tensor
        products = self._matmul(parameters, layout.tokens * layout.tensor, forwards, self.constants.product_efficiency)
        return heads * products, heads * self._moved(8 * self.vocab_size)

    def _moved(self, elements: float) -> float:
        """Seconds to move so many elements for each token."""
        return BYTES * self.layout.tokens * elements / (self.gpu.memory_bandwidth * self.constants.memory_efficiency)

    def _experts(self, forwards: float) -> float:
        layout, model, seconds = self.layout, self.model, 0.0
        each = 3 * model.hidden_size * model.expert_intermediate_size
        for experts in self.sparse:
            local = experts / layout.expert
            rows = layout.tokens * model.top_k / local  # as many come from the other ranks as go there
            efficiency = self.constants.product_efficiency * self.constants.grouped_efficiency
            efficiency *= rows / (rows + TILE_HALF)
            work = 2 * each * rows * local / (self.gpu.peak_flops * efficiency)
            read = BYTES * each * local / (self.gpu.memory_bandwidth * self.constants.memory_efficiency)
            seconds += (forwards + 2) * max(work, read)
        return seconds

    def _attention(self, forwards: float) -> float:
        layout, model = self.layout, self.model
        score_flops = flops_per_token(model, self.vocab_size, layout.sequence_length) - flops_per_token(
            model, self.vocab_size, 0
        )
        forward = score_flops / 3 * layout.tokens
        return forward * (forwards + 2.5) / (self.gpu.peak_flops * self.constants.attention_efficiency)

    def _traffic(self, forwards: float) -> float:
        """Elements that one forward reads and writes outside products; a backward moves twice as many."""
        layout, model = self.layout, self.model
        width, blocks = model.hidden_size, len(model.block_experts)
        heads = model.num_heads + 2 * model.num_kv_heads
        elements = blocks * (14 * width + 3 * heads * model.head_size / layout.tensor)
        elements += len(self.sparse) * self.busiest * model.top_k * (4 * width + 3 * model.expert_intermediate_size)
        shared = model.num_shared_experts * model.expert_intermediate_size / layout.tensor
        elements += len(self.sparse) * 3 * shared
        elements += (blocks - len(self.sparse)) * 3 * model.dense_intermediate_size / layout.tensor
        return self._moved(elements * (forwards + 2) * self.unfused)

    def _alltoall(self, forwards: float) -> float:
        """Dispatch and combine of every layer, forward and backward, in one micro-batch."""
        layout, model = self.layout, self.model
        if layout.expert == 1:
            return 0.0
        nodes = math.ceil(layout.expert / layout.gpus_per_node)
        inside = min(layout.expert, layout.gpus_per_node)
        row = BYTES * model.hidden_size * layout.tokens
        if layout.one_copy_a_node:
            abroad = row * distinct(nodes, model.top_k) * (nodes - 1) / nodes
            near = row * distinct(layout.expert, model.top_k) * (inside - 1) / inside
        else:
            abroad = row * model.top_k * (nodes - 1) / nodes
            near = row * model.top_k * (inside - 1) / layout.expert
        seconds = max(
            abroad / (self.network.bandwidth * self.constants.network_efficiency),
            near / (self.gpu.link_bandwidth * self.constants.link_efficiency),
        )
        latency = self.network.latency * math.log2(layout.expert)
        return len(self.sparse) * 2 * (forwards + 1) * (seconds + latency)

    def _tensor(self, forwards: float) -> float:
        """Gather before and scatter after attention and feed-forward, with sequence parallelism."""
        layout = self.layout
        if layout.tensor == 1:
            return 0.0
        moved = BYTES * self.model.hidden_size * layout.tokens * (layout.tensor - 1)
        seconds = moved / (self.gpu.link_bandwidth * self.constants.link_efficiency)
        # A block of experts spread over whole ranks needs no gather of its own: attention alone does.
        each = sum(2 if experts else 4 for experts in self.model.block_experts)
        return each * (forwards + 2) * seconds

    def _reduction(self, backward: float, busy: float) -> float:
        """What ZeRO's collectives add to the step: gradients are reduced once, or in every micro-batch from stage 2 on;
        parameters are gathered once after the step, or for every pass at stage 3."""
        layout = self.layout
        dense, routed = self._local_parameters()
        runs = layout.micro_batches
        gathers = {0: 0, 1: 1, 2: 1, 3: runs * (2 + layout.extra_forwards)}[layout.zero_stage]
        scatters = {0: 2, 1: 1, 2: runs, 3: runs}[layout.zero_stage]
        seconds = 0.0
        for parameters, ranks, near in (
            (dense, layout.gpus // (layout.tensor * layout.pipeline), layout.gpus_per_node // layout.tensor),
            (routed, layout.gpus // (layout.expert * layout.pipeline), layout.gpus_per_node // layout.expert),
        ):
            moved = parameters * (ranks - 1) / ranks * (BYTES * gathers + layout.gradient_bytes * scatters)
            seconds += moved / self._ring(ranks, max(near, 1))
            # A message of each block has to get round: what is left of a collective when there is little to move.
            latency = self.network.latency * math.log2(ranks)
            seconds += (gathers + scatters) * len(self.model.block_experts) / layout.pipeline * latency
        cover = {0: backward, 1: backward, 2: runs * backward, 3: busy}[layout.zero_stage]
        return seconds - min(self.constants.hidden_reduction * seconds, cover)

    def _ring(self, ranks: int, near: int) -> float:
        """Bytes/s of a ring: all ports of a node that the group's ranks in it own, but no more than a link."""
        link = self.gpu.link_bandwidth * self.constants.link_efficiency
        if ranks <= near:
            return link
        return min(link, near * self.network.bandwidth * self.constants.network_efficiency)

    def _optimizer(self) -> float:
        """AdamW reads and writes 34 bytes a parameter: master, two moments, gradient, and the bf16 copy."""
        layout = self.layout
        dense, routed = self._local_parameters()
        if layout.zero_stage:
            dense /= layout.gpus / (layout.tensor * layout.pipeline)
            routed /= layout.gpus / (layout.expert * layout.pipeline)
        return 34 * (dense + routed) / (self.gpu.memory_bandwidth * self.constants.memory_efficiency)

    def _local_parameters(self) -> tuple[float, float]:
        """Parameters that a GPU would hold without ZeRO: dense, and routed experts."""
        count, layout = count_parameters(self.model, self.vocab_size), self.layout
        routed = count.total["routed experts"]
        dense = (count.num_total - routed) / (layout.tensor * layout.pipeline)
        return dense, routed / (layout.expert * layout.pipeline)


def distinct(places: float, draws: int) -> float:
    """Expected number of different places among `draws` uniform ones."""
    return places * (1 - (1 - 1 / places) ** draws)
