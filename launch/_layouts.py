"""Which layouts a configuration could run in, what each would take, and which assumption decides."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from configs.schema import RunConfig
from launch._hardware import Gpu, Network
from launch._predict import predict
from launch._states import model_state_bytes
from launch._step_terms import Constants, Layout, Prediction, Software
from moe.arithmetic import activation_bytes, count_parameters
from moe.loss_head import tile_size
from trainer.engine_choices import zero_table

USABLE = 0.92
"""Of a GPU's memory; the rest is lost between the allocator's blocks (our assumption)."""
RESERVED_BYTES = 2.5e9
"""CUDA context, kernels and NCCL's buffers (our assumption)."""
ELEMENT_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Cluster:
    """The machines a run is foretold for, and what is assumed of the run on them."""

    gpu: Gpu
    network: Network
    nodes: int
    gpus_per_node: int
    max_violation: float
    software: Software
    needs_whole_step: bool
    """Whether a hook or the model must see the whole step before any backward."""

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Choice:
    """One layout of a run, and what it takes."""

    config: RunConfig
    layout: Layout
    prediction: Prediction
    memory_bytes: float
    fits: bool
    kept_graphs: int
    """Micro-batches whose graphs exist at once."""

    @property
    def overrides(self) -> str:
        """What to set to have it."""
        config = self.config
        return (
            f"engine.zero_stage={config.engine.zero_stage} engine.expert_parallel_size="
            f"{config.engine.expert_parallel_size} train.micro_batch_size={config.train.micro_batch_size} "
            f"model.activation_recompute={config.model.activation_recompute}"
        )


def weigh(config: RunConfig, vocab_size: int, cluster: Cluster, constants: Constants) -> Choice:
    """Time and memory of a configuration as it stands."""
    train, engine, model = config.train, config.engine, config.model
    micro_batches = train.global_batch_size // (train.micro_batch_size * cluster.gpus)
    mode = train.mode(needs_whole_step=cluster.needs_whole_step, keeps_graphs=engine.keeps_graphs)
    fixed, graph = _memory(config, vocab_size, cluster)
    usable = USABLE * cluster.gpu.memory_bytes - RESERVED_BYTES
    kept = {"deferred": micro_batches, "auto": micro_batches}.get(mode, 1)
    if mode == "auto":  # as many as fit, and one in any case
        kept = max(min(kept, int((usable - fixed) // graph)), 1)
    extra = {"two_pass": 1.0, "auto": 1 - kept / micro_batches if kept < micro_batches else 0.0}.get(mode, 0.0)
    layout = Layout(
        gpus=cluster.gpus,
        gpus_per_node=cluster.gpus_per_node,
        sequence_length=train.sequence_length,
        micro_batch=train.micro_batch_size,
        global_batch=train.global_batch_size,
        zero_stage=engine.zero_stage,
        expert=engine.expert_parallel_size,
        recompute=model.activation_recompute,
        extra_forwards=extra,
        gradient_bytes=ELEMENT_BYTES[engine.reduction_dtype],
        tiled_head=tile_size(model.loss_tile, train.micro_batch_size * train.sequence_length, vocab_size) < vocab_size,
        max_violation=cluster.max_violation,
        software=cluster.software,
    )
    memory = fixed + kept * graph
    prediction = predict(model, vocab_size, layout, cluster.gpu, cluster.network, constants)
    return Choice(config, layout, prediction, memory, memory <= usable, kept)


def candidates(config: RunConfig, gpus: int) -> Iterator[RunConfig]:
    """The layouts of the same training that the configuration's own checks accept.

    ZeRO stage x ranks that share experts x micro-batch x recomputation; none changes a step beyond rounding.
    """
    per_rank = config.train.global_batch_size // gpus
    micro_batches = [size for size in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if size <= per_rank]
    shares = [2**n for n in range(int(math.log2(min(gpus, 64))) + 1)]
    for stage in range(4):
        for share in shares:
            engine = replace(config.engine, zero_stage=stage, expert_parallel_size=share)
            for micro_batch in micro_batches:
                train = replace(config.train, micro_batch_size=micro_batch)
                for recompute in ("none", "selective", "block"):
                    model = replace(config.model, activation_recompute=recompute)
                    candidate = replace(config, engine=engine, train=train, model=model)
                    if not candidate.problems(gpus):
                        yield candidate


def ranked(config: RunConfig, vocab_size: int, cluster: Cluster, constants: Constants) -> list[Choice]:
    """All candidates: those that fit, fastest first, then those that do not, smallest first."""
    choices = [weigh(candidate, vocab_size, cluster, constants) for candidate in candidates(config, cluster.gpus)]
    return sorted(
        choices, key=lambda choice: (not choice.fits, choice.prediction.seconds if choice.fits else choice.memory_bytes)
    )


def elasticities(
    choice: Choice, vocab_size: int, cluster: Cluster, constants: Constants
) -> dict[str, tuple[float, float]]:
    """Relative change of the step time when an assumption is a fifth smaller and larger, the strongest first."""
    model, layout, base = choice.config.model, choice.layout, choice.prediction.seconds

    def at(name: str, factor: float) -> float:
        other, changed = layout, constants
        if name == "max_violation":
            other = replace(layout, max_violation=layout.max_violation * factor)
        else:
            limit = 1.0 if "efficiency" in name or "hidden" in name else math.inf
            changed = replace(constants, **{name: min(getattr(constants, name) * factor, limit)})
        return predict(model, vocab_size, other, cluster.gpu, cluster.network, changed).seconds / base - 1

    names = [*(item.name for item in fields(Constants)), "max_violation"]
    found = {name: (at(name, 0.8), at(name, 1.2)) for name in names}
    return dict(sorted(found.items(), key=lambda item: -max(map(abs, item[1]))))


def _memory(config: RunConfig, vocab_size: int, cluster: Cluster) -> tuple[float, float]:
    """Bytes that are there whatever is kept, and those of one micro-batch's graph."""
    count, engine, model = count_parameters(config.model, vocab_size), config.engine, config.model
    routed = count.total["routed experts"]
    states = sum(model_state_bytes(engine, count.num_total - routed, routed, cluster.gpus).values())
    low = ELEMENT_BYTES[engine.precision]
    buckets = 0.0
    if engine.zero_stage and not engine.reduces_flat_buffers:
        local = count.num_total - routed + routed / engine.expert_parallel_size
        # What is put together is held as DeepSpeed keeps gradients at this stage, and once more as they are sent.
        kept_in = {1: engine.accumulation_dtype, 2: engine.precision, 3: engine.reduction_dtype}[engine.zero_stage]
        held = ELEMENT_BYTES[kept_in] + ELEMENT_BYTES[engine.reduction_dtype]
        buckets = held * zero_table(engine, int(local), cluster.gpus)["reduce_bucket_size"]
    gathered = 0.0
    if engine.zero_stage == 3:  # the block at work and the one that is fetched ahead
        gathered = 2 * low * (count.num_total - count.total["embedding"]) / len(model.block_experts)
    tokens = config.train.micro_batch_size * config.train.sequence_length

    def activations(kept: int) -> float:
        return activation_bytes(model, vocab_size, tokens=tokens, element_bytes=low, kept_graphs=kept)

    graph = activations(2) - activations(1)
    return states + buckets + gathered + activations(1) - graph, graph
