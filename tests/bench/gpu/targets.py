"""What the figures of `make gpu-bench` shall be, on an H200 (and its compute twin, the H100)."""

from tests.bench.gpu.layer import SHAPES

_PEERS = {
    "sonic_moe": 1.0, "torchtitan_bf16": 1.5, "transformers_qwen3_grouped_mm": 1.5, "transformers_glm4_grouped_mm": 1.5,
}  # fmt: skip
_BOUND = {"forward": 0.88, "both": 0.80}

AT_LEAST = {f"gpu/moe_layer/{shape}/{part}/bound_over_ours": of for shape in SHAPES for part, of in _BOUND.items()}
AT_LEAST |= {
    f"gpu/moe_layer/{shape}/{part}/peer/{name}": of
    for shape in SHAPES
    for part in _BOUND
    for name, of in _PEERS.items()
}
AT_LEAST |= {
    "gpu/train_step/mfu/balanced": 0.45,
    "gpu/train_step/mfu/routed": 0.45,
    "gpu/train_step/tokens_ratio": 1.3,
    "gpu/loss_head/peer/liger": 1.0,
    "gpu/loss_head/peer/cut_cross_entropy": 1.0,
}
AT_MOST = {f"gpu/skew/{shape}": 1.10 for shape in SHAPES}
AT_MOST |= {
    "gpu/hooks/bias": 1.001,
    "gpu/hooks/frozen": 1.005,
    "gpu/host_syncs/model": 0,
    "gpu/host_syncs/accumulate": 2,
    "gpu/host_syncs/hooks": 0,
    "gpu/loss_head/memory_ratio": 0.125,
}
