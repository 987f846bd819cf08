"""What of DeepSpeed is chosen from the model and the number of ranks, and why; `launch.dryrun` prints it.

Pure functions of the settings, the parameters and the ranks: every rank chooses alike, and so does a run that is
resumed. None of the choices changes what is added up; what was measured is in tests/bench/NOTES.md.

The bucket is how many elements of gradients are reduced in one collective. Each costs a latency, which grows with the
ranks, so the most that is put together does too: Megatron's rule, 40 million elements or one million a rank. What is
put together is copied twice and held once more, so a small model has several buckets all the same, and a gradient that
is larger than a bucket is reduced where it lies. One rank has nothing to send.
"""

from typing import Any, NamedTuple

from trainer.engine_config import EngineConfig

ALONE = 2**16
"""Bucket of a single rank: what is smaller is put together, for fewer calls, the rest is left in its place."""
LEAST = 2**20
MOST = 40_000_000
MOST_PER_RANK = 1_000_000
BUCKETS = 8
"""Into how many buckets the gradients go, as long as the buckets get neither too small nor too large."""


class Choice(NamedTuple):
    """One setting as it is given to DeepSpeed."""

    name: str
    value: str
    why: str


def bucket_elements(num_parameters: int, world_size: int) -> int:
    """Gradient elements in one collective, for so many parameters on each of `world_size` ranks."""
    if world_size == 1:
        return ALONE
    return min(max(num_parameters // BUCKETS, LEAST), max(MOST, MOST_PER_RANK * world_size))


def zero_table(config: EngineConfig, num_parameters: int, world_size: int) -> dict[str, Any]:
    """DeepSpeed's `zero_optimization` table: what was chosen, and over it what was configured.

    `num_parameters`: of the model on one rank, before ZeRO cuts it.
    """
    return {
        "stage": config.zero_stage,
        "reduce_bucket_size": config.bucket_elements or bucket_elements(num_parameters, world_size),
        "contiguous_gradients": _must_copy(config),
        "overlap_comm": config.zero_stage == 3,
        "round_robin_gradients": False,
        **config.offload_table,
        **config.zero_options,
    }


def choices(config: EngineConfig, num_parameters: int, world_size: int) -> list[Choice]:
    """Every choice, its value, and why in a few words."""
    table = zero_table(config, num_parameters, world_size)

    def choice(key: str, why: str, name: str = "") -> Choice:
        configured = key in config.zero_options or (name == "bucket_elements" and config.bucket_elements)
        value = table[key]
        shown = str(value).lower() if isinstance(value, bool) else f"{value:,}"
        return Choice(name or f"zero_options.{key}", shown, "as configured" if configured else why)

    found = [Choice("gradients accumulate in", config.accumulation_dtype, _why_accumulated(config))]
    if config.zero_stage == 0:
        how = "not at all" if world_size == 1 else "500,000,000"
        why = "one rank has all there is" if world_size == 1 else "DeepSpeed's own, at zero_stage 0"
        return [*found, Choice("gradients are reduced in pieces of", how, why)]
    if config.reduces_flat_buffers:
        why = "DeepSpeed accumulates in them with bf16 at zero_stage 1"
        return [*found, Choice("gradients are reduced in pieces of", "flat buffers", why)]
    copies = _why_copied(config) if _must_copy(config) else "copied next to each other they would be reduced no faster"
    overlap = (
        "parameters are fetched while the block before works"
        if config.zero_stage == 3
        else "a copy that is late would be reduced half written: DeepSpeed has had such races"
    )
    return [
        *found,
        choice("reduce_bucket_size", _why_bucket(num_parameters, world_size), "bucket_elements"),
        choice("contiguous_gradients", copies),
        choice("overlap_comm", overlap),
        choice("round_robin_gradients", "checkpoints need parameters in their order"),
    ]


def _must_copy(config: EngineConfig) -> bool:
    """Whether DeepSpeed has to copy gradients next to each other before it reduces them."""
    return config.zero_stage in (1, 2) and (config.expert_parallel_size > 1 or config.offload_optimizer)


def _why_copied(config: EngineConfig) -> str:
    if config.offload_optimizer:
        return "offload needs gradients next to each other"
    return "with expert groups DeepSpeed sorts gradients by rank while it copies them"


def _why_accumulated(config: EngineConfig) -> str:
    if config.grad_accumulation != "auto":
        return "as configured"
    if config.accumulation_dtype == "bf16":
        return "DeepSpeed has no fp32 accumulation for bf16 at zero_stage 0"
    return "small gradients are not lost in the sum"


def _why_bucket(num_parameters: int, world_size: int) -> str:
    bucket = bucket_elements(num_parameters, world_size)
    if world_size == 1:
        return "one rank has nothing to send: large gradients stay where they are"
    if bucket == LEAST:
        return "smaller ones would wait for the network more than send"
    if bucket == num_parameters // BUCKETS:
        return f"{BUCKETS} buckets: less to copy and to hold than with one"
    return f"the most for {world_size} ranks: {MOST:,} or {MOST_PER_RANK:,} each"
