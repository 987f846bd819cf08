"""What others measured, with their settings, beside what launch/_predict.py makes of the same settings."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from launch._hardware import GPUS, NETWORKS
from launch._predict import predict
from launch._step_terms import Constants, Layout
from moe.arithmetic import flops_per_token
from moe.config import ModelConfig
from moe.latent import LatentConfig

QWEN3_235B = ModelConfig(
    hidden_size=4096, num_layers=94, num_dense_layers=0, num_heads=64, num_kv_heads=4, head_dim=128, num_experts=128,
    top_k=8, expert_intermediate_size=1536, num_shared_experts=0, router_score="softmax", qk_norm=True,
)  # fmt: skip
QWEN3_30B = replace(QWEN3_235B, hidden_size=2048, num_layers=48, num_heads=32, expert_intermediate_size=768)
DEEPSEEK_16B = ModelConfig(
    hidden_size=2048, num_layers=27, num_dense_layers=1, dense_intermediate_size=10944, num_heads=16, num_kv_heads=16,
    attention="mla", num_experts=64, top_k=6, expert_intermediate_size=1408, num_shared_experts=2,
    mla=LatentConfig(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
)  # fmt: skip

MODEL_ZOO = "Megatron MoE Model Zoo, best_practice/Qwen3/readme.md (commit c1ad0b5)"
BRIDGE = "Megatron-Bridge, pull request 5094"
AUTOMODEL = "NeMo AutoModel, performance summary (DGX H100, bf16)"
TITAN = "torchtitan, pull request 1993"


REAL_MAXVIO = 1.0
"""Assumed of the run that routed really: its authors do not say. With 16 experts on a rank, a quarter more work."""


class Published(NamedTuple):
    """One measurement of others."""

    name: str
    model: ModelConfig
    vocab_size: int
    layout: Layout
    gpu: str
    tflops: float
    """Model TFLOP/s of a GPU by our count: causal attention once."""
    group: str
    """Rows of one group come from one stack and share its quirks; they are left out together."""
    source: str
    required: bool = True
    """Whether the promise of a quarter is about this row; others are shown beside."""


def _megatron(name: str, tflops: float, **settings: Any) -> Published:
    """Qwen3-235B on 256 H100; ZeRO 1 is Megatron's distributed optimizer, gradients are reduced in fp32."""
    known: dict[str, Any] = {
        "gpus": 256, "sequence_length": 4096, "micro_batch": 1, "global_batch": 2048, "expert": 32, "tensor": 2,
        "pipeline": 8, "virtual": 4, "recompute": "act", "one_copy_a_node": True,
    }  # fmt: skip
    required = settings.pop("required", False)
    layout = Layout(**{**known, **settings})
    return Published(name, QWEN3_235B, 151936, layout, "h100", tflops, "megatron", MODEL_ZOO, required)


def _titan(name: str, mfu: float, required: bool = False, **settings: Any) -> Published:
    """DeepSeek-V3-16B on 8 B200. torchtitan counts attention's full square, so the MFU is turned into tokens first."""
    known: dict[str, Any] = {
        "gpus": 8, "sequence_length": 4096, "micro_batch": 4, "zero_stage": 3, "expert": 8, "software": "eager"
    }  # fmt: skip
    known |= settings
    layout = Layout(**known, global_batch=8 * known["micro_batch"])
    ours = flops_per_token(DEEPSEEK_16B, 102400, layout.sequence_length)
    theirs = 2 * ours - flops_per_token(DEEPSEEK_16B, 102400, 0)
    tflops = mfu * GPUS["b200"].peak_flops * ours / theirs / 1e12
    return Published(name, DEEPSEEK_16B, 102400, layout, "b200", tflops, "torchtitan", TITAN, required)


_QWEN3_30B_16 = Layout(gpus=16, sequence_length=4096, micro_batch=1, global_batch=1024, expert=16, one_copy_a_node=True)
_LONG = {"expert": 8, "tensor": 4, "global_batch": 256, "recompute": "moe"}

PUBLISHED = (
    _megatron("Qwen3-235B, 256 H100", 245, required=True),
    _megatron("the same, all-to-all overlapped", 276, required=True, overlap=True),
    _megatron("16k tokens, forced balance", 295, required=True, sequence_length=16384, **_LONG),
    _megatron("16k tokens, really routed", 237, required=True, sequence_length=16384, max_violation=REAL_MAXVIO,
              **_LONG),
    Published(
        "Qwen3-30B-A3B, 8 H100", QWEN3_30B, 151936,
        Layout(gpus=8, sequence_length=4096, micro_batch=4, global_batch=512, zero_stage=3, expert=8,
               recompute="block", one_copy_a_node=True),
        "h100", 12040 * flops_per_token(QWEN3_30B, 151936, 4096) / 1e12, "automodel", AUTOMODEL,
    ),
    _titan("DeepSeek-V3-16B, 8 B200, recomputed", 0.135, True, recompute="block"),
    _titan("nothing recomputed", 0.16, True),
    _titan("compiled", 0.175, True, software="compiled"),
    _titan("experts not spread", 0.18, True, software="compiled", expert=1),
    _titan("6 sequences", 0.20, True, software="compiled", expert=1, micro_batch=6),
    _titan("4 sequences of 6144", 0.21, True, software="compiled", expert=1, sequence_length=6144),
    _megatron("ZeRO 3, all recomputed", 276, expert=8, pipeline=1, virtual=1, micro_batch=4, zero_stage=3,
              recompute="block", gradient_bytes=2),
    _megatron("pipeline of 32, plain all-to-all", 200, expert=8, pipeline=32, virtual=3, one_copy_a_node=False),
    _megatron("tensor 4, experts in a node", 167, expert=8, tensor=4, recompute="none"),
    Published("Qwen3-30B-A3B, 16 H100", QWEN3_30B, 151936, _QWEN3_30B_16, "h100", 240.1, "bridge", BRIDGE, False),
    Published("the same, all-to-all overlapped", QWEN3_30B, 151936, replace(_QWEN3_30B_16, overlap=True), "h100", 287.3,
              "bridge", BRIDGE, False),
)  # fmt: skip


FITTED = {
    "hidden_alltoall": lambda row: row.layout.overlap,
    "compiled": lambda row: row.layout.software == "compiled",
    "eager": lambda row: row.layout.software == "eager",
}
"""The constants fitted to published rows, and which rows each acts on; no row feels two of them."""

GRIDS = {"hidden_alltoall": [n / 100 for n in range(101)], "compiled": [n / 10 for n in range(10, 121)]}
GRIDS["eager"] = GRIDS["compiled"]


def foretell(row: Published, constants: Constants) -> float:
    """Model TFLOP/s of a GPU that the formula gives for a published setting."""
    found = predict(row.model, row.vocab_size, row.layout, GPUS[row.gpu], NETWORKS["ib400"], constants)
    return found.flops_per_gpu / 1e12


def fit(name: str, rows: Sequence[Published], constants: Constants) -> float:
    """The value of one constant with the least squared relative error (of logarithms) over the rows it acts on."""

    def error(value: float) -> float:
        changed = replace(constants, **{name: value})
        return sum(math.log(foretell(row, changed) / row.tflops) ** 2 for row in rows)

    return min(GRIDS[name], key=error)


def left_out(row: Published, constants: Constants) -> float | None:
    """What is foretold for a row when the constant it helped to fit is fitted without it.

    A constant that no other row knows goes back to what it is where nothing is known: nothing hidden, everything fused.
    None if no constant was fitted to the row.
    """
    name = next((name for name, acts_on in FITTED.items() if row.required and acts_on(row)), None)
    if name is None:
        return None
    others = [other for other in PUBLISHED if other.required and other is not row and FITTED[name](other)]
    unknown = 0.0 if name == "hidden_alltoall" else 1.0
    value = fit(name, others, constants) if others else unknown
    return foretell(row, replace(constants, **{name: value}))
