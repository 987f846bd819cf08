"""Balancing rules: golden values and laws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.balance_metrics import dead_experts, load_entropy, max_violation
from moe.rules import RULES, centered_sign, relative_error, sign

loads = st.lists(st.integers(0, 2**40), min_size=2, max_size=64).map(lambda values: torch.tensor(values))


def test_sign_moves_towards_balance() -> None:
    bias_E = sign(torch.tensor([1, 5, 0, 2]), torch.zeros(4), 1e-3)
    assert bias_E.tolist() == pytest.approx([1e-3, -1e-3, 1e-3, 0.0])


def test_centered_sign_removes_the_mean_of_the_step() -> None:
    bias_E = centered_sign(torch.tensor([1, 5, 0, 2]), torch.zeros(4), 1e-3)
    assert bias_E.tolist() == pytest.approx([0.75e-3, -1.25e-3, 0.75e-3, -0.25e-3])


def test_error_is_exact_beyond_float32_integers() -> None:
    counts_E = torch.tensor([2**30 + 1, 2**30, 2**30, 2**30 - 1])  # float32 cannot tell these apart
    assert relative_error(counts_E).sign().tolist() == [-1.0, 0.0, 0.0, 1.0]


@given(counts_E=loads, rate=st.floats(1e-6, 1.0))
def test_overloaded_experts_fall_and_underloaded_rise(counts_E: torch.Tensor, rate: float) -> None:
    step_E = sign(counts_E, torch.zeros(counts_E.numel()), rate)
    mean = counts_E.double().mean()
    assert not (step_E[counts_E.double() > mean] > 0).any()
    assert not (step_E[counts_E.double() < mean] < 0).any()
    assert step_E.abs().max() <= rate * (1 + 1e-6)


@given(counts_E=loads, rate=st.floats(1e-6, 1.0))
def test_centered_sign_keeps_the_mean(counts_E: torch.Tensor, rate: float) -> None:
    step_E = centered_sign(counts_E, torch.zeros(counts_E.numel()), rate)
    assert abs(step_E.double().mean().item()) <= 1e-6 * rate
    differences = sign(counts_E, torch.zeros(counts_E.numel()), rate)
    torch.testing.assert_close(step_E - step_E[0], differences - differences[0], rtol=1e-4, atol=1e-6 * rate)


@pytest.mark.parametrize("name", RULES)
def test_no_tokens_or_perfect_balance_moves_nothing(name: str) -> None:
    bias_E = torch.tensor([0.1, -0.2, 0.3])
    for counts_E in (torch.zeros(3, dtype=torch.int64), torch.full((3,), 7)):
        assert torch.equal(RULES[name](counts_E, bias_E, 0.5), bias_E)


@pytest.mark.parametrize("name", RULES)
def test_static_scores_get_balanced(name: str) -> None:
    torch.manual_seed(0)
    scores_NE = (torch.randn(512, 16) + torch.linspace(-1, 1, 16)).sigmoid()
    bias_E = torch.zeros(16)
    violations = []
    for _ in range(600):
        counts_E = torch.bincount((scores_NE + bias_E).topk(4).indices.flatten(), minlength=16)
        violations.append(max_violation(counts_E).item())
        bias_E = RULES[name](counts_E, bias_E, 2e-3)
    assert violations[0] > 0.8
    assert sum(violations[-50:]) / 50 < 0.06


def test_metrics_on_known_loads() -> None:
    counts_E = torch.tensor([4, 3, 1, 8, 0])
    assert max_violation(counts_E).item() == pytest.approx((8 - 3.2) / 3.2)
    assert dead_experts(counts_E).item() == 1
    assert load_entropy(torch.tensor([5, 5, 5, 5])).item() == pytest.approx(1.0)
    assert load_entropy(torch.tensor([9, 0, 0])).item() == pytest.approx(0.0)
    assert max_violation(torch.full((8,), 3)).item() == 0.0


@given(counts_E=loads.filter(lambda counts: counts.sum() > 0))
def test_metrics_stay_in_range(counts_E: torch.Tensor) -> None:
    experts = counts_E.numel()
    assert -1e-12 <= max_violation(counts_E).item() <= experts - 1 + 1e-9
    assert -1e-12 <= load_entropy(counts_E).item() <= 1 + 1e-12
    assert 0 <= dead_experts(counts_E).item() < experts
