"""The coefficients of the objective."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.objective import SampleSplit, loss_coefficients


def test_known_coefficients() -> None:
    tokens_B = torch.tensor([10, 30, 0, 60])
    assert loss_coefficients(tokens_B, None, "samples").tolist() == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3])
    assert loss_coefficients(tokens_B, None, "tokens").tolist() == pytest.approx([0.1, 0.3, 0, 0.6])
    weights_B = torch.tensor([0.5, 0.25, 0.0, 0.25])
    assert loss_coefficients(tokens_B, weights_B, "samples").tolist() == pytest.approx([0.5, 0.25, 0, 0.25])
    assert loss_coefficients(tokens_B, weights_B, "tokens").tolist() == pytest.approx(
        [5 / 27.5, 7.5 / 27.5, 0, 15 / 27.5]
    )


def test_domain_factors_join_the_weights() -> None:
    tokens_B, factors_B = torch.tensor([10, 30, 0, 60]), torch.tensor([2.0, 1.0, 5.0, 0.0])
    assert loss_coefficients(tokens_B, None, "samples", factors_B).tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert loss_coefficients(tokens_B, None, "tokens", factors_B).tolist() == pytest.approx([0.4, 0.6, 0, 0])


@given(tokens=st.lists(st.integers(0, 10_000), min_size=1, max_size=50), by=st.sampled_from(["samples", "tokens"]))
def test_coefficients_sum_to_one_or_are_all_zero(tokens: list[int], by: str) -> None:
    coefficients_B = loss_coefficients(torch.tensor(tokens), None, by)  # type: ignore[arg-type]
    assert coefficients_B.sum().item() == pytest.approx(float(any(tokens)))
    assert not coefficients_B[torch.tensor(tokens) == 0].any()


def test_token_normalisation_is_the_mean_over_all_tokens() -> None:
    losses_BT = torch.rand(4, 6, dtype=torch.float64)
    kept_BT = torch.rand(4, 6) < 0.5
    kept_BT[2] = False
    losses_BT = losses_BT * kept_BT
    split = SampleSplit(kept_BT, None, 1)
    means_B = split.sums(losses_BT) / split.tokens().clamp(min=1)
    objective = (loss_coefficients(split.tokens(), None, "tokens") * means_B).sum()
    assert objective.item() == pytest.approx(losses_BT[kept_BT].mean().item(), rel=1e-6)
