"""The convex toy: its bound, its correction, and its figures for the seed that is shipped."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reweighting.strategies import STRATEGIES
from reweighting.theory import Weigh, descend, smallest_temperature_for_cap, toy_quadratics
from reweighting.weighing import sample_weights

normalized = sorted(name for name, strategy in STRATEGIES.items() if strategy.normalized)


def weigher(name: str, r: float, cap: float = 0.0) -> Weigh:
    def weigh(losses_B: Tensor) -> Tensor:
        valid_B = torch.ones(losses_B.shape, dtype=torch.bool)
        return sample_weights(losses_B, valid_B, STRATEGIES[name], alpha=1.0, temperature=r, cap=cap)

    return weigh


@pytest.mark.parametrize(
    ("name", "average"), [("uniform", 7.90), ("linupper", 6.16), ("quadratic", 6.80), ("extremes", 9.11)]
)
def test_average_loss_of_the_toy(name: str, average: float) -> None:
    """64 functions in 80 dimensions, 400 steps of 1/(2L), r = 1: down-weighting easy samples helps, extremes hurt."""
    descent = descend(toy_quadratics(), weigher(name, 1.0), 400)
    assert float(descent.average_T.mean()) == pytest.approx(average, abs=5e-3)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6), name=st.sampled_from(normalized), r=st.floats(0.1, 10), steps=st.integers(1, 60),
    functions=st.integers(2, 20), width=st.integers(1, 30),
)  # fmt: skip
def test_the_bound_holds(seed: int, name: str, r: float, steps: int, functions: int, width: int) -> None:
    descent = descend(toy_quadratics(seed, functions, width), weigher(name, r), steps)
    assert float(descent.weighted_T.mean()) <= descent.bound * (1 + 1e-9)
    assert float(descent.average_T.mean()) <= (descent.bound + descent.correction) * (1 + 1e-9) + 1e-12


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), r=st.floats(0.1, 10), steps=st.integers(1, 60))
def test_the_correction_is_not_positive_where_weights_do_not_fall_with_the_loss(
    seed: int, r: float, steps: int
) -> None:
    problem = toy_quadratics(seed, 12, 8)
    assert descend(problem, weigher("linupper", r), steps).correction <= 1e-9
    assert descend(problem, weigher("linear", 10 * r), steps).correction <= 1e-9


def test_the_correction_can_be_positive_elsewhere() -> None:
    assert descend(toy_quadratics(), weigher("extremes", 1.0), 400).correction > 0


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), cap=st.floats(1.05, 4))
def test_the_cap_holds_for_every_batch_from_its_temperature_on(seed: int, cap: float) -> None:
    losses_B = torch.rand(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for name in normalized:
        weights_B = weigher(name, smallest_temperature_for_cap(cap))(losses_B)
        assert weights_B.max().item() * 40 <= cap * (1 + 1e-9)


def test_below_its_temperature_a_batch_breaks_the_cap() -> None:
    """One high score among very many low ones: its weight tends to e^(1/r) / B."""
    losses_B = torch.cat([torch.zeros(10_000, dtype=torch.float64), torch.ones(1, dtype=torch.float64)])
    assert smallest_temperature_for_cap() == pytest.approx(1.4427, abs=1e-4)
    weights_B = weigher("linupper", 1.40)(losses_B)
    assert weights_B.max().item() * 10_001 > 2
    assert math.isclose(weights_B.max().item() * 10_001, math.exp(1 / 1.40), rel_tol=1e-3)
