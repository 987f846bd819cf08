"""A step asks the device for nothing but the verdict on its losses, whatever hooks and accumulation it runs with.

Seen on a CPU by the operations that would wait for a GPU (tests/waits.py); tests/gpu has the same on a real one.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe.bias_hook import ExpertBiasConfig, ExpertBiasHook
from moe.config import AuxLossConfig, ModelConfig
from moe.model import MoEDecoder
from reweighting.hook import FrozenConfig, SampleReweightConfig, SampleReweightHook
from reweighting.reference import ReferenceConfig
from tests.bench.collectives import LocalEngine
from tests.waits import ROOT, DeviceWaits
from trainer.accumulate import AccumulationMode, Accumulator
from trainer.data.loader import MicroBatch
from trainer.hooks import Hook, HookList, RunContext, StepResult
from trainer.telemetry import StepTelemetry
from trainer.train_state import TrainState

VOCAB, LENGTH, ROWS, MICRO_BATCHES = 64, 16, 2, 3
SHAPE: dict[str, Any] = {
    "hidden_size": 32, "num_layers": 2, "num_dense_layers": 1, "dense_intermediate_size": 32, "num_heads": 4,
    "num_kv_heads": 2, "num_experts": 8, "top_k": 2, "expert_intermediate_size": 16, "num_shared_experts": 1,
}  # fmt: skip


def batches(step: int) -> list[MicroBatch]:
    found = []
    for m in range(MICRO_BATCHES):
        tokens_bT = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(9 * step + m))
        documents_bT = (torch.arange(LENGTH) // 6).expand(ROWS, -1).contiguous()
        ids_b = torch.arange(ROWS) + ROWS * (m + MICRO_BATCHES * step)
        zeros_b = torch.zeros_like(ids_b)
        found.append(MicroBatch(ids_b, zeros_b, tokens_bT, tokens_bT.clone(), documents_bT, zeros_b))
    return found


VERDICT = "seen = torch.stack([finite_B.all().double(), num_tokens.double(), batch.signals.double(), mean]).tolist()"
AUDIT = "is_off = float(audit) > config.frozen.tolerance"


def waits_of(
    mode: AccumulationMode, hooks: dict[str, Hook], steps: int = 3, per_row: int = 1, **shape: Any
) -> set[str]:
    """The lines at which a few steps would wait."""
    torch.manual_seed(0)
    # In bf16 the experts run as they do on CUDA.
    model = MoEDecoder(ModelConfig(**(SHAPE | shape)), vocab_size=VOCAB).bfloat16()
    hook_list = HookList(hooks)
    hook_list.on_start(
        RunContext(
            model=model, total_steps=9, global_batch_size=ROWS * MICRO_BATCHES, domain_names=("a",),
            domain_shares=(1.0,), run_dir=Path(), seed=0, device=torch.device("cpu"), samples_per_row=per_row,
            has_weights=hook_list.has_weights, is_frozen=mode == "frozen", excerpts=lambda samples: [],
        )
    )  # fmt: skip
    accumulator = Accumulator(
        LocalEngine(model), hook_list, mode=mode, normalization="tokens",  # type: ignore[arg-type]
        num_micro_batches=MICRO_BATCHES, samples_per_row=per_row, device=torch.device("cpu"),
    )  # fmt: skip
    waits, state, applied = DeviceWaits(), TrainState(), StepResult(applied=True, reason="")
    telemetry = StepTelemetry(state, ("a",), flops_per_token=1.0, precision="bf16", device=torch.device("cpu"))
    for step in range(steps):
        with waits:
            telemetry.start_step()
            done = accumulator.run(batches(step), step=step + 1, applied_steps=step, recorder=telemetry.buffer)
            hook_list.after_step(done.context, applied)
            telemetry.record_step(
                state, done.context, done.coefficients_B, applied, learning_rate=0.0, grad_norm=torch.tensor(1.0)
            )
        accumulator.budget.settle()
    if mode == "frozen":
        assert done.gradient_scale is not None, "the last step ran with frozen weights"
    places = [place.split()[0].split(":") for place in waits.places]
    return {(ROOT / file).read_text().splitlines()[int(line) - 1].strip() for file, line in places}


def reweight(**changes: Any) -> SampleReweightHook:
    return SampleReweightHook(SampleReweightConfig(record_every=1, **changes))


@pytest.mark.parametrize("mode", ["deferred", "two_pass", "auto"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cap": 2.0, "ess_floor": 0.5},
        {"reference": ReferenceConfig(kind="quantile")},
        {"reference": ReferenceConfig(kind="running"), "weigh": "documents"},
    ],
)
def test_weights_are_set_without_waiting(mode: AccumulationMode, changes: dict[str, Any]) -> None:
    per_row = 3 if "weigh" in changes else 1
    hooks: dict[str, Hook] = {"sample_reweight": reweight(**changes)}
    if per_row == 1:
        hooks["expert_bias"] = ExpertBiasHook(ExpertBiasConfig(count="weight"))
    assert waits_of(mode, hooks, per_row=per_row) == {VERDICT}


@pytest.mark.parametrize("rule", ["sign", "pid", "smebu", "multiplicative", "quantile", "bip", "none"])
def test_biases_move_without_waiting(rule: str) -> None:
    hooks: dict[str, Hook] = {"expert_bias": ExpertBiasHook(ExpertBiasConfig(rule=rule))}  # type: ignore[arg-type]
    assert waits_of("streaming", hooks) == {VERDICT}


@pytest.mark.parametrize(
    "shape",
    [
        {"document_mask": True, "activation_recompute": "block"},
        {"capacity_factor": 1.0, "mtp_weight": 0.3},
        {"aux_loss": AuxLossConfig(switch=0.01, sequence=0.01, z=0.001), "num_groups": 4, "top_groups": 2},
        {"loss_tile": 16, "router_jitter": 0.01, "dropout": 0.1},
    ],
)
def test_models_of_every_kind_forward_without_waiting(shape: dict[str, Any]) -> None:
    assert waits_of("streaming", {"expert_bias": ExpertBiasHook(ExpertBiasConfig())}, steps=1, **shape) == {VERDICT}


def test_a_frozen_step_waits_once_more_for_its_audit() -> None:
    hooks: dict[str, Hook] = {"sample_reweight": reweight(frozen=FrozenConfig(tolerance=1e9))}
    assert waits_of("frozen", hooks) == {VERDICT, AUDIT}


def test_a_wait_is_seen() -> None:
    with DeviceWaits() as waits:
        values = torch.rand(4)
        values[values.argmax()]
        values[values > 0.5]
        float(values.sum())
        values.tolist()
        torch.tensor(1.0, device=values.device)
        torch.tensor(1.0)  # stays with the host
    assert len(waits.places) == 5
