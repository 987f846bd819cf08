"""Bytes of model state on one rank, by ZeRO stage."""

from trainer.engine_config import EngineConfig


def model_state_bytes(engine: EngineConfig, num_dense: int, num_routed: int, world_size: int) -> dict[str, float]:
    """Bytes of model state on one rank by component (Rajbhandari et al. 2020, arXiv 1910.02054, section 3).

    Stage 1 shards optimizer state and master weights over ranks, stage 2 gradients too, stage 3 parameters too (those
    of the layer at work are whole; they are not counted here). Routed experts are first divided by expert parallelism,
    then their state over the ranks that hold the same share. Buckets and the alignment of shards are not counted.
    """
    low = 2 if engine.precision == "bf16" else 4
    accumulate = 2 if engine.accumulation_dtype == "bf16" else 4
    # DeepSpeed's ZeRO keeps a flat float32 copy of its shard even when the model itself is float32.
    has_master = engine.precision == "bf16" or engine.zero_stage > 0
    local = num_dense + num_routed / engine.expert_parallel_size
    # A share of the experts lies on world / P ranks and its state is cut among those: 1 / world of all experts.
    sharded = local if engine.zero_stage == 0 else (num_dense + num_routed) / world_size
    return {
        "parameters": low * (sharded if engine.zero_stage == 3 else local),
        "gradients": accumulate * (sharded if engine.zero_stage >= 2 else local),
        "master weights": 4 * sharded if has_master else 0.0,
        "Adam moments": 8 * sharded,
    }
