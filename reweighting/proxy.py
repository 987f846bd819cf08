"""Domain weights from a small proxy model, in plain torch: DoReMi with a reference model, and DoGE.

The proxy takes a gradient step on sum_d alpha_d loss_d, where every domain has the same number of rows in the batch,
and alpha moves before it. What comes out is the mean of alpha over the steps, to sample a large model's data by.

Shape letters: D domains, b rows of a domain, T sequence, P parameters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from reweighting.domains import doge_alignment, doge_update, doremi_update


@dataclass(frozen=True, kw_only=True)
class ProxyConfig:
    """How the proxy's domain weights move."""

    rule: Literal["doremi", "doge"]
    """DoReMi (arXiv 2305.10429) or DoGE (arXiv 2310.15393)."""
    eta: float = 1.0
    """DoReMi: size of a step."""
    mu: float = 0.05
    """DoGE: strength of the pull towards the weights of the step before; larger moves less."""
    smoothing: float = 1e-3
    """Share that is spread evenly over the domains at each step."""
    clip_norm: float = 1.0
    """DoGE: norm each domain's gradient is clipped to before gradients are compared; 0 leaves them."""


class DomainBatch(NamedTuple):
    """The rows of one domain in a step."""

    losses_bT: Tensor
    """Cross-entropy of each token under the proxy, with a graph; 0 where there is no target."""
    reference_bT: Tensor | None
    """The same under the reference model, without."""
    counted_bT: Tensor
    """Which tokens are targets."""

    @property
    def mean(self) -> Tensor:
        return self.losses_bT.sum() / self.counted_bT.sum()


def excess_loss(batch: DomainBatch) -> Tensor:
    """Mean over target tokens of max(loss - reference loss, 0): DoReMi clips every token before it averages. Scalar."""
    assert batch.reference_bT is not None
    excess_bT = (batch.losses_bT.detach() - batch.reference_bT).clamp(min=0)
    return torch.where(batch.counted_bT, excess_bT, 0.0).sum() / batch.counted_bT.sum()


def proxy_step(
    parameters: Sequence[nn.Parameter],
    alpha_D: Tensor,
    batches: Sequence[DomainBatch],
    config: ProxyConfig,
    *,
    learning_rate: float,
    step: Callable[[], None],
) -> Tensor:
    """Move alpha by what this batch says, then the parameters by the gradient of sum_d alpha_d loss_d; the new alpha.

    `step`: applies the gradients that are then in the parameters, and clears them.
    """
    if config.rule == "doremi":
        excess_D = torch.stack([excess_loss(batch) for batch in batches])
        alpha_D = doremi_update(alpha_D, excess_D, eta=config.eta, smoothing=config.smoothing)
        total = sum(alpha * batch.mean for alpha, batch in zip(alpha_D.float(), batches, strict=True))
        assert isinstance(total, Tensor)
        total.backward()
    else:
        gradients_DP = torch.stack([_flat_gradient(batch.mean, parameters) for batch in batches])
        if config.clip_norm:
            norms_D1 = gradients_DP.norm(dim=1, keepdim=True)
            gradients_DP = gradients_DP * (config.clip_norm / norms_D1.clamp(min=1e-12)).clamp(max=1)
        alpha_D = doge_update(
            alpha_D, doge_alignment(gradients_DP, learning_rate), mu=config.mu, smoothing=config.smoothing
        )
        mixed_P = alpha_D.float() @ gradients_DP
        parts = mixed_P.split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter).clone()
    step()
    return alpha_D


def _flat_gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    zeros = (torch.zeros_like(parameter) for parameter in parameters)
    return torch.cat([(zero if g is None else g).flatten() for g, zero in zip(gradients, zeros, strict=True)])
