"""Weights of whole domains. Pure functions.

A domain's weight alpha is its share of the objective. Two rules move it by multiplicative weights:

- DoReMi (Xie et al. 2023, arXiv 2305.10429): alpha grows with the excess loss over a reference,
  `alpha <- (1 - c) normalise(alpha exp(eta excess)) + c / D`, with excess = max(loss - reference, 0).
- DoGE (Fan et al. 2024, arXiv 2310.15393): alpha grows with how much a step on the domain helps the others,
  `alpha <- normalise(alpha exp(W / mu))`, with W_i = lr <g_i, sum_{j != i} g_j> / mean ||g||, g the domains' gradients.

Shape letters: D domains, B samples of the optimizer step, P parameters.
"""

import torch
from torch import Tensor


def doremi_update(alpha_D: Tensor, excess_D: Tensor, *, eta: float, smoothing: float) -> Tensor:
    """One step of DoReMi's domain weights (Algorithm 1), float64 [D], positive, summing to one.

    `excess_D`: loss over the reference in nats, not negative; `smoothing`: the share c that is spread evenly.
    """
    moved_D = torch.softmax(alpha_D.double().log() + eta * excess_D.double(), dim=0)
    return (1 - smoothing) * moved_D + smoothing / len(alpha_D)


def doge_alignment(gradients_DP: Tensor, learning_rate: float) -> Tensor:
    """W_D: how far a step on each domain lowers the loss of all others, in units of the mean gradient norm, [D].

    The domain itself is left out and gradients are scaled by their mean norm, as in the authors' code.
    """
    products_DD = gradients_DP @ gradients_DP.T
    others_D = products_DD.sum(1) - products_DD.diagonal()
    return learning_rate * others_D / (gradients_DP.norm(dim=1).mean() + 1e-6)


def doge_update(alpha_D: Tensor, alignment_D: Tensor, *, mu: float, smoothing: float = 0.0) -> Tensor:
    """One step of DoGE's domain weights (equation 5), float64 [D], positive, summing to one."""
    moved_D = torch.softmax(alpha_D.double().log() + alignment_D.double() / mu, dim=0)
    return (1 - smoothing) * moved_D + smoothing / len(alpha_D)


def domain_factors(alpha_D: Tensor, shares_D: Tensor) -> Tensor:
    """Factor on the weight of each domain's samples, [D], such that domain d makes alpha_d of the objective on average.

    `shares_D`: share of the training samples that each domain provides; where it is zero, so is the factor.
    """
    return torch.where(shares_D > 0, alpha_D / shares_D.clamp(min=1e-30), 0.0)


def domain_means(values_B: Tensor, tokens_B: Tensor, domains_B: Tensor, num_domains: int) -> tuple[Tensor, Tensor]:
    """Token-weighted mean of per-sample values in each domain, float64 [D] (NaN where absent), and its tokens, [D]."""
    tokens_B = tokens_B.double()
    columns_B2 = torch.stack([torch.where(tokens_B > 0, values_B.double() * tokens_B, 0.0), tokens_B], dim=1)
    sums_D2 = columns_B2.new_zeros(num_domains, 2).index_add_(0, domains_B, columns_B2)
    return sums_D2[:, 0] / sums_D2[:, 1], sums_D2[:, 1]
