"""What of DeepSpeed is chosen from the model and the number of ranks, and why; `launch.dryrun` prints it.

Pure functions of the settings, the parameters and the ranks: every rank chooses alike, and so does a run that is
resumed. None of the choices changes what is added up; what was measured is in tests/bench/NOTES.md.

The bucket is how many elements of gradients are reduced in one collective. Each costs a latency, which grows with the
ranks, so the most that is put together does too: Megatron's rule, 40 million elements or one million a rank. What is
put together is copied three times and held once more, so a small model has several buckets all the same, and a gradient
that is larger than a bucket is reduced where it lies. One rank has nothing to send.
"""

from typing import Any, NamedTuple

from trainer.engine_config import EngineConfig

ALONE = 2**18
"""Bucket of a single rank: what is smaller is put together, for fewer calls, the rest is left in its place."""
LEAST = 2**20
BUCKETS = 8
"""Into how many buckets the gradients go, as long as the buckets get neither too small nor too large."""
MOST = 40_000_000
MOST_PER_RANK = 1_000_000
LIMIT = 500_000_000
"""DeepSpeed's own bucket, 2 GB of float32: beyond it memory matters more than the latency of a collective."""


class Choice(NamedTuple):
    """One setting as it is given to DeepSpeed."""

    name: str
    value: str
    why: str


def bucket_elements(num_parameters: int, world_size: int) -> int:
    """Gradient elements in one collective, for so many parameters on each of `world_size` ranks."""
    if world_size == 1:
        return ALONE
    return min(max(num_parameters // BUCKETS, LEAST), _most(world_size))


def zero_table(config: EngineConfig, num_parameters: int, world_size: int) -> dict[str, Any]:
    """DeepSpeed's `zero_optimization` table: what was chosen, and over it what was configured.

    `num_parameters`: of the model on one rank, before ZeRO cuts it.
    """
    return {
        "stage": config.zero_stage,
        "reduce_bucket_size": config.bucket_elements or bucket_elements(num_parameters, world_size),
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "overlap_comm": config.zero_stage == 3,
        "round_robin_gradients": False,
        **config.offload_table,
        **config.zero_options,
    }


def choices(config: EngineConfig, num_parameters: int, world_size: int) -> list[Choice]:
    """Every choice, its value, and why in a few words."""
    table = zero_table(config, num_parameters, world_size)
    found = [
        Choice("gradients accumulate in", config.accumulation_dtype, _why_accumulated(config)),
        Choice("gradients are reduced in", config.reduction_dtype, _why_reduced(config)),
    ]
    if config.zero_stage == 0 or config.reduces_flat_buffers:
        return [*found, _fixed_bucket(config, world_size)]

    def choice(key: str, why: str) -> Choice:
        shown = str(table[key]).lower()
        return Choice(f"zero_options.{key}", shown, "as configured" if key in config.zero_options else why)

    bucket = table["reduce_bucket_size"]
    why = "as configured" if config.bucket_elements else _why_bucket(num_parameters, world_size)
    return [
        *found,
        Choice("bucket_elements", f"{bucket:,}", why),
        choice("contiguous_gradients", "a copy next to each other outlives the gradients; experts need it"),
        choice("reduce_scatter", "a rank keeps its own share; experts need it"),
        choice("overlap_comm", _why_overlapped(config)),
        choice("round_robin_gradients", "checkpoints find Adam's numbers by the order of parameters"),
    ]


def _fixed_bucket(config: EngineConfig, world_size: int) -> Choice:
    """Where DeepSpeed asks nobody how much it reduces at once."""
    ignored = "; bucket_elements has no effect" if config.bucket_elements else ""
    if config.reduces_flat_buffers:
        return Choice("reduced at once", "all", f"bf16 at zero_stage 1 accumulates in one flat buffer a group{ignored}")
    if world_size == 1:
        return Choice("reduced at once", "nothing", f"one rank has the whole gradient{ignored}")
    return Choice("reduced at once", f"{LIMIT:,}", f"fixed by DeepSpeed at zero_stage 0{ignored}")


def _most(world_size: int) -> int:
    return min(max(MOST, MOST_PER_RANK * world_size), LIMIT)


def _why_bucket(num_parameters: int, world_size: int) -> str:
    bucket = bucket_elements(num_parameters, world_size)
    if world_size == 1:
        return "one rank has nothing to send: large gradients stay where they are"
    if bucket == LEAST:
        return "a smaller one would be waited for longer than it takes to send"
    if bucket == _most(world_size):
        return f"the most for {world_size:,} ranks: {MOST:,} or {MOST_PER_RANK:,} a rank, up to {LIMIT:,}"
    return f"an {BUCKETS}th of the gradients: less to copy and to hold than all at once"


def _why_overlapped(config: EngineConfig) -> str:
    if config.zero_stage == 3:
        return "parameters of the next block are fetched while one works"
    return "DeepSpeed has reduced buckets that were still being written (its issue 8061)"


def _why_reduced(config: EngineConfig) -> str:
    if config.reduce_dtype != "auto":
        return "as configured"
    if config.precision == "fp32" or config.reduction_dtype == "bf16":
        return "the type they accumulate in"
    return "the type they accumulate in: bf16 would halve the bytes and be off by some 0.2 %"


def _why_accumulated(config: EngineConfig) -> str:
    if config.grad_accumulation != "auto":
        return "as configured"
    if config.accumulation_dtype == "bf16":
        return "DeepSpeed has no fp32 accumulation for bf16 at zero_stage 0"
    return "small gradients are not lost in the sum"
