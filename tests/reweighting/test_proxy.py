"""Steps of the proxy: which domains gain weight, and that its parameters follow the weighted gradient."""

import pytest
import torch
from torch import Tensor, nn

from reweighting.domains import doge_alignment, doge_update
from reweighting.proxy import DomainBatch, ProxyConfig, excess_loss, proxy_step

COUNTED = torch.ones(2, 3, dtype=torch.bool)


def batch_of(losses: list[list[float]], reference: list[list[float]] | None = None) -> DomainBatch:
    return DomainBatch(
        torch.tensor(losses, requires_grad=True), None if reference is None else torch.tensor(reference), COUNTED
    )


def test_excess_is_clipped_at_each_token_before_it_is_averaged() -> None:
    batch = batch_of([[1.0, 5.0, 2.0], [2.0, 2.0, 2.0]], [[3.0, 2.0, 2.0], [2.0, 2.0, 2.0]])
    assert excess_loss(batch).item() == pytest.approx(3 / 6), "the token that is 2 below its reference counts as 0"


def linear_domains(weight: nn.Parameter) -> list[DomainBatch]:
    """Two domains whose losses pull the parameters the same way, and one that pulls the other way."""
    inputs = [torch.tensor([[1.0, 0.2]] * 6), torch.tensor([[0.8, 0.4]] * 6), torch.tensor([[-1.0, 0.1]] * 6)]
    return [DomainBatch((each @ weight).view(2, 3), torch.zeros(2, 3), COUNTED) for each in inputs]


def test_doge_prefers_domains_that_help_others_and_steps_on_the_mixture() -> None:
    weight = nn.Parameter(torch.tensor([2.0, 2.0]))
    config = ProxyConfig(rule="doge", mu=0.5, smoothing=0.0, clip_norm=0.0)
    alpha_D = torch.full((3,), 1 / 3, dtype=torch.float64)
    steps: list[Tensor] = []

    def step() -> None:
        assert weight.grad is not None
        steps.append(weight.grad.clone())

    moved_D = proxy_step([weight], alpha_D, linear_domains(weight), config, learning_rate=0.5, step=step)
    gradients_DP = torch.tensor([[1.0, 0.2], [0.8, 0.4], [-1.0, 0.1]])
    torch.testing.assert_close(moved_D, doge_update(alpha_D, doge_alignment(gradients_DP, 0.5), mu=0.5))
    assert moved_D[2] < moved_D[:2].min()
    torch.testing.assert_close(steps[0], moved_D.float() @ gradients_DP)


def test_doremi_steps_on_the_moved_weights() -> None:
    weight = nn.Parameter(torch.tensor([2.0, 2.0]))
    config = ProxyConfig(rule="doremi", eta=1.0, smoothing=0.0)
    alpha_D = torch.full((3,), 1 / 3, dtype=torch.float64)
    moved_D = proxy_step([weight], alpha_D, linear_domains(weight), config, learning_rate=0.5, step=lambda: None)
    losses_D = torch.tensor([2.4, 2.4, 0.0])  # the third is below its reference
    torch.testing.assert_close(moved_D, torch.softmax(losses_D.double(), dim=0), rtol=1e-6, atol=1e-6)
    assert weight.grad is not None
    expected = moved_D.float() @ torch.tensor([[1.0, 0.2], [0.8, 0.4], [-1.0, 0.1]])
    torch.testing.assert_close(weight.grad, expected)


def test_clipping_bounds_what_one_domain_can_say() -> None:
    weight = nn.Parameter(torch.tensor([2.0, 2.0]))
    inputs = [torch.tensor([[100.0, 0.0]] * 6), torch.tensor([[1.0, 0.0]] * 6)]
    batches = [DomainBatch((each @ weight).view(2, 3), None, COUNTED) for each in inputs]
    config = ProxyConfig(rule="doge", mu=1.0, smoothing=0.0, clip_norm=1.0)
    alpha_D = torch.full((2,), 0.5, dtype=torch.float64)
    moved_D = proxy_step([weight], alpha_D, batches, config, learning_rate=1.0, step=lambda: None)
    assert moved_D.tolist() == pytest.approx([0.5, 0.5])
