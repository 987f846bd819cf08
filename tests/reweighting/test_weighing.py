"""Sample weights: the golden values of the paper's rule, and its laws."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from reweighting.strategies import STRATEGIES
from reweighting.temperature import TemperatureConfig, temperature
from reweighting.weighing import effective_sample_size, normalized_losses, sample_weights

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


def spread_losses(min_size: int = 2) -> st.SearchStrategy[Tensor]:
    values = st.lists(st.floats(0.01, 20), min_size=min_size, max_size=40)
    return values.map(lambda v: torch.tensor(v, dtype=torch.float64))


names = st.sampled_from(sorted(STRATEGIES))


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


def test_large_temperature_is_uniform() -> None:
    assert (5 * weigh(LOSSES, "extremes", 1e6)).tolist() == pytest.approx([1.0] * 5, abs=1e-5)


def test_normalized_losses_span_alpha() -> None:
    h_B, is_spread = normalized_losses(LOSSES, torch.ones(5, dtype=torch.bool), 2.0)
    assert h_B.tolist() == [-2.0, -1.0, 0.0, 1.0, 2.0]
    assert is_spread


def test_effective_sample_size() -> None:
    assert effective_sample_size(torch.full((8,), 1 / 8)).item() == pytest.approx(8)
    assert effective_sample_size(torch.tensor([1.0, 0.0, 0.0])).item() == pytest.approx(1)
    assert effective_sample_size(torch.zeros(3)).item() == 0


def test_temperature_warms_up_then_holds() -> None:
    config = TemperatureConfig(value=0.4, warmup_steps=3, warmup_value=50.0)
    assert [temperature(config, n) for n in range(5)] == [50.0, 50.0, 50.0, 0.4, 0.4]
    assert len(TemperatureConfig(value=math.nan, warmup_steps=-1, warmup_value=0.0).problems()) == 3


@pytest.mark.parametrize(("name", "expected"), [("linupper", "less"), ("quadratic", "less"), ("extremes", "more")])
def test_interpolating_quadratics(name: str, expected: str) -> None:
    """Where one minimiser serves all samples, down-weighting easy ones speeds up; up-weighting extremes slows down."""
    torch.manual_seed(0)
    samples, width = 64, 80
    directions = torch.randn(samples, width, dtype=torch.float64)
    start, rate = torch.randn(width, dtype=torch.float64), 1 / (2 * directions.square().sum(1).max())

    def average_loss(strategy: str) -> float:
        theta, total = start.clone(), 0.0
        for _ in range(400):
            residual_B = directions @ theta
            losses_B = 0.5 * residual_B.square()
            weights_B = weigh(losses_B, strategy, 1.0)
            total += losses_B.mean().item() / 400
            theta = theta - rate * (weights_B * residual_B) @ directions
        return total

    ratio = average_loss(name) / average_loss("uniform")
    assert (ratio < 0.99) if expected == "less" else (ratio > 1.01), ratio
