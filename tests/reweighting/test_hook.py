"""The hook: statistics, frozen weights and their audit, state, and what it refuses."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from reweighting.hook import FrozenConfig, SampleReweightConfig, SampleReweightHook
from reweighting.reference import ReferenceConfig
from reweighting.strategies import STRATEGIES
from reweighting.temperature import TemperatureConfig
from tests.moe.test_bias_hook import APPLIED, SKIPPED, Records
from trainer.hooks import EvaluationContext, HookList, RunContext, StepContext


def started(*, is_frozen: bool = False, **options: object) -> SampleReweightHook:
    hook = SampleReweightHook(SampleReweightConfig(**options))  # type: ignore[arg-type]
    hook.on_start(
        RunContext(
            model=nn.Identity(), total_steps=10, global_batch_size=8, domain_names=("a", "b"), domain_shares=(0.5, 0.5),
            run_dir=Path(), device=torch.device("cpu"), seed=0, samples_per_row=1, has_weights=True,
            is_frozen=is_frozen,
            excerpts=lambda samples: [f"text {row}, {part}" for row, part in samples],
        )
    )  # fmt: skip
    return hook


def step_of(losses_B: Tensor, applied: int = 0, used_B: Tensor | None = None, masked: int = 0) -> StepContext:
    size = len(losses_B)
    ids_B = torch.arange(size) + size * applied
    tokens_B = torch.full((size,), 9)
    tokens_B[:masked] = 0
    return StepContext(
        step=applied + 1, applied_steps=applied, sample_ids_B=ids_B, parts_B=torch.zeros_like(ids_B),
        domains_B=ids_B % 2, tokens_B=tokens_B, losses_B=losses_B, own_S=torch.arange(size), recorder=Records(),
        used_B=used_B,
    )  # fmt: skip


def run_step(hook: SampleReweightHook, step: StepContext, result: object = APPLIED) -> StepContext:
    HookList({"sample_reweight": hook}).on_losses(step)
    hook.after_step(step, result)  # type: ignore[arg-type]
    return step


def losses(seed: int, size: int = 8, level: float = 3.0) -> Tensor:
    return level + torch.randn(size, generator=torch.Generator().manual_seed(seed)).abs()


batches = st.integers(0, 1000)


@given(first=batches, second=batches, r=st.floats(0.2, 5), cut=st.integers(1, 7))
def test_running_statistics_make_frozen_weights_exact(first: int, second: int, r: float, cut: int) -> None:
    """The scale comes from the steps before, so weights are known before the losses: whole or in parts, the same."""
    options = {"reference": ReferenceConfig(kind="running"), "temperature": TemperatureConfig(value=r)}
    hook = started(is_frozen=True, **options)
    run_step(hook, step_of(losses(first)))
    weigh = hook.frozen_weights(1)
    assert weigh is not None
    now_B = losses(second)
    valid_B = torch.ones(8, dtype=torch.bool)
    parts_B = torch.cat([weigh(now_B[:cut], valid_B[:cut]), weigh(now_B[cut:], valid_B[cut:])])
    step = run_step(hook, step_of(now_B, applied=1))
    assert step.weights_B is not None
    torch.testing.assert_close(parts_B / parts_B.sum(), step.weights_B, rtol=1e-5, atol=1e-7)


@given(first=batches, second=batches, r=st.floats(0.2, 5))
def test_linear_weights_need_no_statistics_to_be_exact(first: int, second: int, r: float) -> None:
    hook = started(is_frozen=True, strategy="linear", temperature=TemperatureConfig(value=r))
    run_step(hook, step_of(losses(first)))
    weigh = hook.frozen_weights(1)
    assert weigh is not None
    used_B = weigh(losses(second), torch.ones(8, dtype=torch.bool))
    step = run_step(hook, step_of(losses(second), applied=1))
    torch.testing.assert_close(used_B / used_B.sum(), step.weights_B, rtol=1e-4, atol=1e-6)


@given(
    strategy=st.sampled_from(sorted(STRATEGIES)),
    alpha=st.floats(0.01, 200),
    r=st.floats(0.01, 10),
    now=st.lists(st.floats(0, 40), min_size=2, max_size=8),
)
def test_frozen_weights_fit_into_float32_and_so_do_their_squares(
    strategy: str, alpha: float, r: float, now: list[float]
) -> None:
    """Whatever losses come after statistics of others: gradients are accumulated at their scale."""
    hook = started(is_frozen=True, strategy=strategy, alpha=alpha, temperature=TemperatureConfig(value=r))
    run_step(hook, step_of(losses(0)))
    weigh = hook.frozen_weights(1)
    assert weigh is not None
    weights_B = weigh(torch.tensor(now).double(), torch.ones(len(now), dtype=torch.bool)).float()
    assert torch.isfinite((1e4 * weights_B).square().sum()), "10,000 tokens a sample"
    assert (weights_B.square() > 1e-30).all(), "no sample is lost to underflow, whose square a norm has to hold"


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
@pytest.mark.parametrize("alpha", [1.0, 100.0])
def test_the_sample_that_counts_most_has_the_frozen_weight_one(strategy: str, alpha: float) -> None:
    hook = started(is_frozen=True, strategy=strategy, alpha=alpha, temperature=TemperatureConfig(value=0.4))
    run_step(hook, step_of(torch.tensor([2.0, 3.0, 4.0]).double()))
    weigh = hook.frozen_weights(1)
    assert weigh is not None
    weights_B = weigh(torch.tensor([2.0, 3.0, 4.0]).double(), torch.ones(3, dtype=torch.bool))
    assert weights_B.max() == pytest.approx(1.0)


def test_one_sample_far_above_all_others_has_the_frozen_weight_that_it_should() -> None:
    hook = started(is_frozen=True, strategy="linear", temperature=TemperatureConfig(value=0.1))
    run_step(hook, step_of(torch.tensor([4.0, 5.0]).double()))
    weigh = hook.frozen_weights(1)
    assert weigh is not None
    now_B = torch.tensor([4.0, 5.0, 14.0]).double()
    used_B = weigh(now_B, torch.ones(3, dtype=torch.bool)).float()
    step = run_step(hook, step_of(now_B, applied=1))
    torch.testing.assert_close((used_B / used_B.sum()).double(), step.weights_B, rtol=0, atol=1e-12)


def test_first_step_cannot_be_frozen_and_an_audit_beyond_the_tolerance_makes_the_next_exact() -> None:
    hook = started(
        is_frozen=True, temperature=TemperatureConfig(value=0.1), frozen=FrozenConfig(tolerance=0.01, exact_steps=3)
    )
    assert hook.frozen_weights(0) is None
    run_step(hook, step_of(losses(0)))
    assert hook.frozen_weights(1) is not None

    same = step_of(losses(0), applied=1, used_B=torch.full((8,), 1 / 8))
    run_step(hook, same)
    assert same.recorder.values["reweight/audit_kl"] == pytest.approx(0, abs=1e-6)  # type: ignore[attr-defined]
    assert same.recorder.values["reweight/frozen"] == 1  # type: ignore[attr-defined]
    assert hook.frozen_weights(2) is not None

    far = step_of(losses(1, level=0.5), applied=2, used_B=torch.full((8,), 1 / 8))
    run_step(hook, far)
    assert far.recorder.values["reweight/audit_kl"] > 0.01  # type: ignore[attr-defined]
    assert [hook.frozen_weights(n) is None for n in range(3, 8)] == [True, True, True, False, False]


def test_skipped_steps_leave_no_trace_in_the_statistics() -> None:
    hook = started(is_frozen=True, reference=ReferenceConfig(kind="running"))
    run_step(hook, step_of(losses(0)))
    before = hook.state_dict()
    run_step(hook, step_of(losses(1), applied=1), SKIPPED)
    after = hook.state_dict()
    assert all(torch.equal(torch.as_tensor(before[key]), torch.as_tensor(after[key])) for key in before)


def test_state_restores_the_weights_of_the_next_step() -> None:
    options = {"is_frozen": True, "reference": ReferenceConfig(kind="running", quantile=0.1)}
    hook = started(**options)  # type: ignore[arg-type]
    for n in range(3):
        run_step(hook, step_of(losses(n), applied=n))
    other = started(**options)  # type: ignore[arg-type]
    other.load_state_dict(hook.state_dict())
    steps = [run_step(each, step_of(losses(9), applied=3)) for each in (hook, other)]
    assert torch.equal(steps[0].weights_B, steps[1].weights_B)  # type: ignore[arg-type]
    assert not torch.equal(
        steps[0].weights_B,
        run_step(started(**options), step_of(losses(9), applied=3)).weights_B,  # type: ignore[arg-type]
    ), "the window matters"


def test_masked_samples_weigh_nothing_and_enter_no_statistic() -> None:
    hook = started(is_frozen=True)
    spoilt_B = losses(0)
    spoilt_B[:3] = torch.tensor([1e9, -1e9, 0.0])
    step = run_step(hook, step_of(spoilt_B, masked=3))
    clean = run_step(started(is_frozen=True), step_of(losses(0)[3:]))
    assert step.weights_B is not None
    assert not step.weights_B[:3].any()
    torch.testing.assert_close(step.weights_B[3:], clean.weights_B)


def test_every_sample_is_recorded_now_and_then_and_extremes_are_shown() -> None:
    hook = started(record_every=2, show_documents=2, temperature=TemperatureConfig(value=0.2))
    recorded = [run_step(hook, step_of(losses(n), applied=n)).recorder.values for n in range(3)]  # type: ignore[attr-defined]
    assert ["reweight/samples/loss" in values for values in recorded] == [True, False, True]
    torch.testing.assert_close(recorded[2]["reweight/samples/weight"].sum().item(), 8.0)

    shown = Records()
    hook.on_evaluate(EvaluationContext(step=3, tokens=1, recorder=shown))
    table = shown.values["reweight/documents"]
    assert [row["weight"] for row in table] == sorted((row["weight"] for row in table), reverse=True)
    assert len(table) == 4
    lowest = int(losses(2).argmin())
    assert table[-1]["sample"] == 16 + lowest
    assert table[-1]["text"] == f"text {16 + lowest}, None"
    assert table[-1]["domain"] in ("a", "b")


def test_cap_and_floor_are_options_that_frozen_refuses() -> None:
    assert SampleReweightHook(SampleReweightConfig(cap=2.0)).frozen_problem
    assert SampleReweightHook(SampleReweightConfig(ess_floor=0.5)).frozen_problem
    assert not SampleReweightHook(SampleReweightConfig()).frozen_problem
    assert not SampleReweightHook(SampleReweightConfig()).exact_problem
    step = run_step(started(cap=1.0), step_of(losses(0)))
    torch.testing.assert_close(step.weights_B, torch.full((8,), 1 / 8))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"strategy": "linuper"}, "strategy: unknown strategy 'linuper'; did you mean 'linupper'?"),
        ({"strategy": "tests.dist.hooks:no_such"}, "strategy: 'tests.dist.hooks:no_such' cannot be imported"),
        ({"strategy": "tests.dist.hooks:Thief"}, "strategy: 'tests.dist.hooks:Thief' fails on normalised losses"),
        ({"strategy": "linear", "alpha": 2.0}, "alpha: strategy linear does not depend on it"),
        ({"strategy": "quadratic", "alpha": 2.0}, "alpha: strategy quadratic does not depend on it"),
        ({"strategy": "uniform", "alpha": 2.0}, "alpha: strategy uniform does not depend on it"),
        ({"strategy": "linear", "reference": ReferenceConfig(kind="running")}, "reference: strategy linear weighs raw"),
        ({"cap": 0.5}, "cap: 0.5 must be at least 1"),
        ({"ess_floor": 1.0}, "ess_floor: 1.0 must be in [0, 1)"),
        ({"record_every": -1}, "record_every: -1 is negative"),
        ({"frozen": FrozenConfig(exact_steps=0)}, "frozen.exact_steps: 0 must be at least 1"),
    ],
)
def test_contradictions_are_refused(options: dict[str, object], line: str) -> None:
    problems = SampleReweightConfig(**options).problems()  # type: ignore[arg-type]
    assert len(problems) == 1
    assert problems[0].startswith(line)


def test_a_strategy_of_ones_own() -> None:
    hook = started(strategy="tests.reweighting.test_hook:middle_out", temperature=TemperatureConfig(value=0.3))
    step = run_step(hook, step_of(torch.tensor([1.0, 2.0, 3.0])))
    assert step.weights_B is not None
    assert step.weights_B.argmax() == 1


def middle_out(h_B: Tensor, a: float) -> Tensor:
    return -h_B.abs()
