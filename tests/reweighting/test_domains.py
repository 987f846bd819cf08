"""Domain rules: multiplicative weights of DoReMi and DoGE, and the factors they become."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reweighting.domains import doge_alignment, doge_update, domain_factors, domain_means, doremi_update

sizes = st.integers(2, 8)


def distribution(values: list[float]) -> torch.Tensor:
    alpha_D = torch.tensor(values, dtype=torch.float64)
    return alpha_D / alpha_D.sum()


def test_doremi_by_hand() -> None:
    moved = doremi_update(torch.tensor([0.5, 0.5]), torch.tensor([math.log(3), 0.0]), eta=1.0, smoothing=0.1)
    assert moved.tolist() == pytest.approx([0.9 * 0.75 + 0.05, 0.9 * 0.25 + 0.05])


@given(
    values=st.lists(st.floats(0.01, 1), min_size=2, max_size=8), eta=st.floats(0.01, 3), c=st.floats(0, 0.5),
    data=st.data(),
)  # fmt: skip
def test_doremi_stays_a_distribution_and_prefers_excess(
    values: list[float], eta: float, c: float, data: st.DataObject
) -> None:
    alpha_D = distribution(values)
    excess_D = torch.tensor(data.draw(st.lists(st.floats(0, 5), min_size=len(values), max_size=len(values))))
    moved_D = doremi_update(alpha_D, excess_D, eta=eta, smoothing=c)
    assert moved_D.sum().item() == pytest.approx(1)
    assert (moved_D >= c / len(values) - 1e-12).all()
    unsmoothed_D = doremi_update(alpha_D, excess_D, eta=eta, smoothing=0.0)
    most = excess_D.argmax()
    assert unsmoothed_D[most] >= alpha_D[most] - 1e-9


def test_doge_follows_the_domain_whose_step_helps_the_others() -> None:
    """Domain 0 points where 1 and 2 point on the whole; 1 and 2 are orthogonal to each other."""
    gradients_DP = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    alignment_D = doge_alignment(gradients_DP, learning_rate=0.1)
    mean_norm = (math.sqrt(2) + 1 + 1) / 3 + 1e-6
    assert alignment_D.tolist() == pytest.approx([0.1 * 2 / mean_norm, 0.1 / mean_norm, 0.1 / mean_norm])
    moved_D = doge_update(torch.full((3,), 1 / 3), alignment_D, mu=0.05)
    assert moved_D.sum().item() == pytest.approx(1)
    assert moved_D[0] > moved_D[1]
    assert moved_D[1].item() == pytest.approx(moved_D[2].item())


@given(values=st.lists(st.floats(0.01, 1), min_size=2, max_size=6), data=st.data())
def test_factors_make_each_domain_its_share_of_the_objective(values: list[float], data: st.DataObject) -> None:
    alpha_D = distribution(values)
    counts = data.draw(st.lists(st.integers(1, 50), min_size=len(values), max_size=len(values)))
    shares_D = distribution([float(count) for count in counts])
    per_sample_D = domain_factors(alpha_D, shares_D)
    total_D = per_sample_D * torch.tensor(counts)
    torch.testing.assert_close(total_D / total_D.sum(), alpha_D)


def test_domain_means_are_by_token_and_nan_where_absent() -> None:
    means_D, tokens_D = domain_means(
        torch.tensor([1.0, 3.0, torch.nan]), torch.tensor([1, 3, 0]), torch.tensor([0, 0, 2]), 3
    )
    assert means_D[0].item() == pytest.approx(2.5)
    assert means_D[1:].isnan().all()
    assert tokens_D.tolist() == [4, 0, 0]
