"""Reference statistics: quantiles of the step, and of a window of steps that parts of a batch can add up."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reweighting.reference import (
    BIN_WIDTH,
    LossRange,
    ReferenceConfig,
    batch_range,
    histogram_range,
    loss_histogram,
    normalized_losses,
)

LOSSES = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
losses = st.lists(st.floats(0.01, 20), min_size=1, max_size=60).map(lambda v: torch.tensor(v, dtype=torch.float64))
quantiles = st.floats(0, 0.49)


def everybody(losses_B: Tensor) -> Tensor:
    return torch.ones(losses_B.shape, dtype=torch.bool)


def test_normalized_losses_span_alpha() -> None:
    ends = batch_range(LOSSES, everybody(LOSSES))
    assert normalized_losses(LOSSES, everybody(LOSSES), ends, 2.0).tolist() == [-2.0, -1.0, 0.0, 1.0, 2.0]


def test_an_outlier_moves_the_midrange_but_not_quantiles() -> None:
    losses_B = torch.cat([torch.linspace(2, 4, 99), torch.tensor([50.0])])
    faithful = normalized_losses(losses_B, everybody(losses_B), batch_range(losses_B, everybody(losses_B)), 1.0)
    robust = normalized_losses(losses_B, everybody(losses_B), batch_range(losses_B, everybody(losses_B), 0.05), 1.0)
    assert faithful[:99].max() < -0.9
    assert robust[49].item() == pytest.approx(0, abs=0.05)
    assert robust[99].item() == 1.0, "what lies outside counts as at the end"


@given(losses_B=losses, q=quantiles, num_masked=st.integers(0, 5))
def test_quantiles_of_the_step_are_those_of_its_valid_samples(losses_B: Tensor, q: float, num_masked: int) -> None:
    padded_B = torch.cat([losses_B, torch.full((num_masked,), torch.nan, dtype=torch.float64)])
    ends = batch_range(padded_B, torch.arange(padded_B.numel()) < losses_B.numel(), q)
    assert ends.low.item() == pytest.approx(torch.quantile(losses_B, q).item())
    assert ends.high.item() == pytest.approx(torch.quantile(losses_B, 1 - q).item())


def test_no_valid_sample_gives_an_unknown_range_without_spread() -> None:
    ends = batch_range(LOSSES, torch.zeros(5, dtype=torch.bool))
    assert ends.low.isnan()
    assert not ends.is_spread
    assert not normalized_losses(LOSSES, torch.zeros(5, dtype=torch.bool), ends, 1.0).any()


@given(losses_B=losses, data=st.data())
def test_histograms_of_parts_add_up_to_that_of_the_whole(losses_B: Tensor, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, losses_B.numel()))
    order = torch.tensor(data.draw(st.permutations(range(losses_B.numel()))))
    mixed_B = losses_B[order]
    parts = [loss_histogram(part, everybody(part)) for part in (mixed_B[:cut], mixed_B[cut:])]
    assert torch.equal(parts[0] + parts[1], loss_histogram(losses_B, everybody(losses_B)))


@given(losses_B=losses, q=quantiles)
def test_quantiles_of_a_histogram_are_right_to_a_bin(losses_B: Tensor, q: float) -> None:
    """Between neighbouring losses a quantile is a matter of definition; it must lie between them, within a bin."""
    ends = histogram_range(loss_histogram(losses_B, everybody(losses_B)), q)
    bin_width = BIN_WIDTH + 1e-9
    ordered, rank = losses_B.sort().values, q * losses_B.numel()
    assert ends.low >= ordered[max(math.ceil(rank) - 1, 0)] - bin_width
    assert ends.low <= ordered[min(math.floor(rank), losses_B.numel() - 1)] + bin_width
    mirrored = losses_B.numel() - rank
    assert ends.high >= ordered[max(math.ceil(mirrored - 1e-9) - 1, 0)] - bin_width
    assert ends.high <= ordered[min(math.floor(mirrored + 1e-9), losses_B.numel() - 1)] + bin_width


def test_ends_of_a_histogram_are_minimum_and_maximum() -> None:
    ends = histogram_range(loss_histogram(LOSSES, everybody(LOSSES)), 0.0)
    assert ends.low.item() == pytest.approx(1.0, abs=BIN_WIDTH)
    assert ends.high.item() == pytest.approx(5.0, abs=2 * BIN_WIDTH)
    empty = histogram_range(torch.zeros_like(loss_histogram(LOSSES, everybody(LOSSES))), 0.1)
    assert empty.low.isnan()
    assert empty.high.isnan()


def test_losses_beyond_the_last_bin_are_kept_in_it() -> None:
    huge = torch.tensor([1.0, 1e6])
    assert loss_histogram(huge, everybody(huge))[-1] == 1


def test_range_without_spread() -> None:
    assert not LossRange(torch.tensor(2.0), torch.tensor(2.0 + 1e-7)).is_spread
    assert LossRange(torch.tensor(2.0), torch.tensor(2.1)).is_spread


def test_options_that_are_not_read_are_refused() -> None:
    assert ReferenceConfig(kind="minmax", quantile=0.1).problems() == [
        "quantile: minmax does not read it; set kind to quantile or running, or remove it"
    ]
    assert ReferenceConfig(kind="quantile", decay=0.5).problems()[0].startswith("decay: quantile does not read it")
    assert len(ReferenceConfig(kind="running", quantile=0.5, decay=math.nan).problems()) == 2
