"""Token weights: their formulas, and what they do to an objective."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reweighting.tokens import TokenReweightConfig, token_weights

FOCAL = TokenReweightConfig(strategy="focal", gamma=2.0)
SATIMP = TokenReweightConfig(strategy="satimp", b1=5.0, b2=0.1)


def test_known_values() -> None:
    losses = torch.tensor([0.0, math.log(2), math.log(4)])
    assert token_weights(losses, FOCAL).tolist() == pytest.approx([0.0, 0.25, 0.5625])
    expected = [p**5 * (1 - p) ** 0.1 for p in (1.0, 0.5, 0.25)]
    assert token_weights(losses, SATIMP).tolist() == pytest.approx(expected)


def test_satimp_peaks_at_b1_over_the_sum() -> None:
    p = torch.linspace(0.001, 0.999, 9981, dtype=torch.float64)
    peak = p[token_weights(-p.log(), SATIMP).argmax()].item()
    assert peak == pytest.approx(5.0 / 5.1, abs=2e-3)


@given(loss=st.floats(0, 1000), gamma=st.floats(0, 5), b1=st.floats(0, 5), b2=st.floats(0, 5))
def test_weights_are_finite_and_between_zero_and_one(loss: float, gamma: float, b1: float, b2: float) -> None:
    for config in (
        TokenReweightConfig(strategy="focal", gamma=gamma), TokenReweightConfig(strategy="satimp", b1=b1, b2=b2),
    ):  # fmt: skip
        weight = token_weights(torch.tensor([loss]), config)
        assert torch.isfinite(weight).all()
        assert 0 <= weight.item() <= 1


def test_options_that_are_not_read_are_refused() -> None:
    assert TokenReweightConfig(strategy="focal", b1=1.0).problems() == ["b1: focal does not read it; remove it"]
    assert TokenReweightConfig(strategy="satimp", gamma=2.0).problems() == ["gamma: satimp does not read it; remove it"]
    assert len(TokenReweightConfig(gamma=-1.0).problems()) == 1
