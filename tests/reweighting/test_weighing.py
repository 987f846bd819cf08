"""Sample weights: the golden values of the paper's rule, and its laws."""

import math

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from reweighting.strategies import STRATEGIES
from reweighting.weighing import (
    cap_weights,
    divergence,
    effective_sample_size,
    sample_weights,
    sharpness_for_ess,
    softmax_weights,
)

LOSSES = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
# B * w for losses 1..5 and alpha 1.
GOLDEN = {
    ("linupper", 1.0): [0.462810, 0.763045, 1.258048, 1.258048, 1.258048],
    ("linupper", 0.4): [0.121839, 0.425259, 1.484301, 1.484301, 1.484301],
    ("linupper", 100.0): [0.993017, 0.997994, 1.002996, 1.002996, 1.002996],
    ("quadratic", 1.0): [0.558517, 1.182380, 1.518206, 1.182380, 0.558517],
    ("quadratic", 0.4): [0.183661, 1.197617, 2.237444, 1.197617, 0.183661],
    ("extremes", 1.0): [1.396281, 0.846887, 0.513663, 0.846887, 1.396281],
    ("extremes", 0.4): [1.883172, 0.539538, 0.154580, 0.539538, 1.883172],
    ("uniform", 0.4): [1.0, 1.0, 1.0, 1.0, 1.0],
}
# Largest and smallest B * w for an infinite batch of evenly spread losses.
LIMITS = {
    ("linupper", 1.0): (1.2254, 0.4508),
    ("linupper", 0.4): (1.4629, 0.1201),
    ("quadratic", 1.0): (1.3390, 0.4926),
    ("quadratic", 0.4): (1.8305, 0.1503),
    ("extremes", 1.0): (1.5820, 0.5820),
    ("extremes", 0.4): (2.7236, 0.2236),
}


def weigh(losses_B: Tensor, name: str = "linupper", r: float = 1.0, valid_B: Tensor | None = None) -> Tensor:
    valid_B = torch.ones(losses_B.shape, dtype=torch.bool) if valid_B is None else valid_B
    return sample_weights(losses_B, valid_B, STRATEGIES[name], alpha=1.0, temperature=r)


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_a_strategy_says_whether_it_depends_on_alpha(name: str) -> None:
    valid_B = torch.ones(5, dtype=torch.bool)
    one, two = (sample_weights(LOSSES, valid_B, STRATEGIES[name], alpha=a, temperature=1.0) for a in (1.0, 2.0))
    assert torch.allclose(one, two) != STRATEGIES[name].depends_on_alpha


def spread_losses(min_size: int = 2) -> st.SearchStrategy[Tensor]:
    values = st.lists(st.floats(0.01, 20), min_size=min_size, max_size=40)
    return values.map(lambda v: torch.tensor(v, dtype=torch.float64))


names = st.sampled_from(sorted(name for name, strategy in STRATEGIES.items() if strategy.normalized))


@pytest.mark.parametrize(("name", "r"), GOLDEN)
def test_golden_values(name: str, r: float) -> None:
    assert (5 * weigh(LOSSES, name, r)).tolist() == pytest.approx(GOLDEN[name, r], abs=1e-6)


@pytest.mark.parametrize(("name", "r"), LIMITS)
def test_limits_of_an_even_spread(name: str, r: float) -> None:
    weights = 100_001 * weigh(torch.linspace(1, 3, 100_001, dtype=torch.float64), name, r)
    assert (weights.max().item(), weights.min().item()) == pytest.approx(LIMITS[name, r], abs=1e-4)


@given(losses_B=spread_losses(), name=names, r=st.floats(0.05, 100))
def test_weights_are_a_distribution_within_the_ratio_of_the_temperature(losses_B: Tensor, name: str, r: float) -> None:
    weights_B = weigh(losses_B, name, r)
    assert weights_B.sum().item() == pytest.approx(1)
    assert weights_B.min() > 0
    assert (weights_B.max() / weights_B.min()).item() <= math.exp(1 / r) * (1 + 1e-6)


@given(losses_B=spread_losses(), name=names, r=st.floats(1 / math.log(2), 100))
def test_no_weight_above_two_over_b_for_temperatures_from_1_44(losses_B: Tensor, name: str, r: float) -> None:
    assert weigh(losses_B, name, r).max().item() * losses_B.numel() <= 2 + 1e-9


@given(losses_B=spread_losses(), r=st.floats(0.05, 100))
def test_linupper_never_raises_the_weighted_loss_bound(losses_B: Tensor, r: float) -> None:
    """Chebyshev: weights that do not fall with the loss make sum (1/B - w) l at most zero."""
    weights_B = weigh(losses_B, "linupper", r)
    assert ((1 / losses_B.numel() - weights_B) * losses_B).sum().item() <= 1e-9


@given(losses_B=spread_losses(), name=names, r=st.floats(0.1, 10), data=st.data())
def test_weights_follow_a_permutation(losses_B: Tensor, name: str, r: float, data: st.DataObject) -> None:
    order = torch.tensor(data.draw(st.permutations(range(losses_B.numel()))))
    torch.testing.assert_close(weigh(losses_B[order], name, r), weigh(losses_B, name, r)[order])


@given(losses_B=spread_losses(), name=names, scale=st.floats(0.5, 4), shift=st.floats(0, 5))
def test_weights_ignore_scale_and_shift_of_the_losses(losses_B: Tensor, name: str, scale: float, shift: float) -> None:
    assume((losses_B.max() - losses_B.min()).item() > 0.01)
    torch.testing.assert_close(weigh(scale * losses_B + shift, name), weigh(losses_B, name), rtol=1e-6, atol=1e-9)


@given(losses_B=spread_losses(), name=names, num_masked=st.integers(1, 5), junk=st.floats(-100, 100))
def test_invalid_samples_change_nothing_and_weigh_nothing(
    losses_B: Tensor, name: str, num_masked: int, junk: float
) -> None:
    padded_B = torch.cat([losses_B, torch.full((num_masked,), junk, dtype=torch.float64)])
    valid_B = torch.arange(padded_B.numel()) < losses_B.numel()
    weights_B = weigh(padded_B, name, valid_B=valid_B)
    assert not weights_B[~valid_B].any()
    torch.testing.assert_close(weights_B[valid_B], weigh(losses_B, name), rtol=1e-12, atol=0)


def test_invalid_rows_may_hold_nan() -> None:
    losses_B = torch.tensor([1.0, torch.nan, 3.0, torch.inf])
    weights_B = weigh(losses_B, valid_B=torch.tensor([True, False, True, False]))
    assert torch.equal(weights_B[[0, 2]], weigh(torch.tensor([1.0, 3.0])))
    assert weights_B[[1, 3]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", STRATEGIES)
def test_degenerate_batches(name: str) -> None:
    assert weigh(torch.full((4,), 2.5), name).tolist() == pytest.approx([0.25] * 4), "all losses the same"
    assert weigh(torch.tensor([7.0]), name).tolist() == [1.0]
    nearly = torch.tensor([2.0, 2.0 + 1e-7])
    assert weigh(nearly, name).tolist() == pytest.approx([0.5, 0.5]), "a spread of rounding errors"
    nobody = weigh(torch.tensor([1.0, 2.0]), name, valid_B=torch.tensor([False, False]))
    assert nobody.tolist() == [0.0, 0.0]
    capped = sample_weights(
        torch.tensor([1.0, 2.0, 9.0]), torch.tensor([True, True, False]), STRATEGIES[name],
        alpha=1.0, temperature=0.1, cap=1.0, ess_floor=0.5,
    )  # fmt: skip
    assert capped.tolist() == pytest.approx([0.5, 0.5, 0.0])


def test_large_temperature_is_uniform() -> None:
    assert (5 * weigh(LOSSES, "extremes", 1e6)).tolist() == pytest.approx([1.0] * 5, abs=1e-5)


def test_effective_sample_size() -> None:
    assert effective_sample_size(torch.full((8,), 1 / 8)).item() == pytest.approx(8)
    assert effective_sample_size(torch.tensor([1.0, 0.0, 0.0])).item() == pytest.approx(1)
    assert effective_sample_size(torch.zeros(3)).item() == 0


def capped_by_bisection(weights_B: Tensor, limit: float) -> Tensor:
    """min(limit, c w) that sums to one, by bisection on c."""
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        if torch.minimum(weights_B * middle, torch.tensor(limit)).sum() < 1:
            low = middle
        else:
            high = middle
    return torch.minimum(weights_B * high, torch.tensor(limit, dtype=torch.float64))


@given(losses_B=spread_losses(), name=names, r=st.floats(0.05, 5), cap=st.floats(1, 4))
def test_capped_weights_are_the_water_filled_ones(losses_B: Tensor, name: str, r: float, cap: float) -> None:
    limit = cap / losses_B.numel()
    free_B = weigh(losses_B, name, r)
    capped_B = cap_weights(free_B, limit)
    assert capped_B.sum().item() == pytest.approx(1)
    assert capped_B.max().item() <= limit * (1 + 1e-9)
    torch.testing.assert_close(capped_B, capped_by_bisection(free_B, limit), rtol=1e-6, atol=1e-9)


@given(losses_B=spread_losses(3), r=st.floats(0.05, 1.0), cap=st.floats(1.05, 3), mix=st.floats(0, 1), data=st.data())
def test_capped_weights_solve_the_capped_problem(
    losses_B: Tensor, r: float, cap: float, mix: float, data: st.DataObject
) -> None:
    """No distribution under the cap has a larger sum w s - r KL(w || uniform)."""
    n = losses_B.numel()
    valid_B = torch.ones(n, dtype=torch.bool)
    capped_B = cap_weights(softmax_weights(losses_B / r, valid_B), cap / n)
    other_B = torch.tensor(data.draw(st.lists(st.floats(0.01, 1), min_size=n, max_size=n)), dtype=torch.float64)
    other_B = cap_weights(other_B / other_B.sum(), cap / n) * mix + capped_B * (1 - mix)

    def value(w_B: Tensor) -> float:
        return ((w_B * losses_B).sum() - r * (w_B * (n * w_B.clamp(min=1e-300)).log()).sum()).item()

    assert value(capped_B) >= value(other_B) - 1e-9


@example(losses_B=torch.tensor([1.0, 6.0, 12.0], dtype=torch.float64), name="linupper", r=1.0, floor=0.95)
@given(losses_B=spread_losses(3), name=names, r=st.floats(0.05, 2), floor=st.floats(0.05, 0.95))
def test_effective_sample_size_has_a_floor(losses_B: Tensor, name: str, r: float, floor: float) -> None:
    n = losses_B.numel()
    valid_B = torch.ones(n, dtype=torch.bool)
    weights_B = sample_weights(losses_B, valid_B, STRATEGIES[name], alpha=1.0, temperature=r, ess_floor=floor)
    share = effective_sample_size(weights_B).item() / n
    assert share >= floor - 1e-9
    free = effective_sample_size(weigh(losses_B, name, r)).item() / n
    assert share == pytest.approx(max(floor, free), abs=1e-4), "the temperature is raised no further than needed"


def test_floor_above_what_is_asked_for_changes_nothing() -> None:
    valid_B = torch.ones(5, dtype=torch.bool)
    sharpness = sharpness_for_ess(LOSSES, valid_B, 0.5, 0.1)
    assert sharpness.item() == pytest.approx(0.5, rel=1e-6)


@given(losses_B=spread_losses(3), r=st.floats(0.3, 3), cap=st.floats(1, 3), floor=st.floats(0.1, 0.9))
def test_floor_and_cap_hold_together(losses_B: Tensor, r: float, cap: float, floor: float) -> None:
    n = losses_B.numel()
    valid_B = torch.ones(n, dtype=torch.bool)
    weights_B = sample_weights(
        losses_B, valid_B, STRATEGIES["extremes"], alpha=1.0, temperature=r, cap=cap, ess_floor=floor
    )
    assert weights_B.max().item() * n <= cap * (1 + 1e-6)
    assert effective_sample_size(weights_B).item() / n >= floor - 1e-6


@given(losses_B=spread_losses(), r=st.floats(0.5, 3), shift=st.floats(-5, 5))
def test_linear_is_the_softmax_of_the_losses(losses_B: Tensor, r: float, shift: float) -> None:
    expected_B = torch.softmax(losses_B / r, dim=0)
    torch.testing.assert_close(weigh(losses_B, "linear", r), expected_B, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(weigh(losses_B + shift, "linear", r), expected_B, rtol=1e-6, atol=1e-12)


def test_infinite_temperature_is_uniform() -> None:
    assert weigh(LOSSES, "linupper", math.inf).tolist() == pytest.approx([0.2] * 5, abs=1e-7)


def test_divergence_is_zero_for_equal_weights_and_known_for_others() -> None:
    assert divergence(torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.5, 0.5, 0.0])).item() == 0
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert divergence(torch.tensor([0.75, 0.25]), torch.tensor([0.5, 0.5])).item() == pytest.approx(expected)
