"""Sample weights from the losses of a whole optimizer step. Pure functions; nothing waits for the device.

Everything is float32 or better, over ALL samples of the step: normalising by rank or micro-batch would be another
objective. Samples without target tokens (`valid_B` False) enter no statistic and get weight zero.

Shape letters: B samples of the optimizer step.
"""

import torch
from torch import Tensor

from reweighting.strategies import Strategy

_SPREAD_TOLERANCE = 1e-6  # relative to the largest loss: below it, differences between losses are rounding


def normalized_losses(losses_B: Tensor, valid_B: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """h_B = alpha (2 (l - min) / (max - min) - 1) in [-alpha, alpha], and whether the losses spread at all.

    Minimum and maximum are of this step's valid samples (arXiv 2502.06733, equation 7). Where the spread is too small,
    and at invalid samples, h is 0.
    """
    losses_B = losses_B.double() if losses_B.dtype == torch.float64 else losses_B.float()
    low = torch.where(valid_B, losses_B, torch.inf).min()
    high = torch.where(valid_B, losses_B, -torch.inf).max()
    spread = high - low
    is_spread = spread > _SPREAD_TOLERANCE * high.abs().clamp(min=1.0)
    h_B = alpha * (2 * (losses_B - low) / torch.where(is_spread, spread, 1.0) - 1)
    return torch.where(valid_B & is_spread, h_B, 0.0), is_spread


def sample_weights(
    losses_B: Tensor, valid_B: Tensor, strategy: Strategy, *, alpha: float, temperature: float
) -> Tensor:
    """softmax(score / temperature) over valid samples, [B]: sums to one, exactly zero where invalid.

    Uniform if all losses are the same; all zero if no sample is valid. Losses of valid samples must be finite: the
    loop skips a step where one is not.
    """
    h_B, is_spread = normalized_losses(losses_B, valid_B, alpha)
    scores_B = torch.where(is_spread, strategy(h_B, alpha), 0.0) / temperature
    scores_B = torch.where(valid_B, scores_B, -torch.inf)
    unnormalized_B = torch.where(valid_B, (scores_B - scores_B.max()).exp(), 0.0)
    return unnormalized_B / unnormalized_B.sum().clamp(min=1e-30)


def effective_sample_size(weights_B: Tensor) -> Tensor:
    """1 / sum w^2: how many equally weighted samples have the same variance (Kish 1965). Scalar; 0 without weights."""
    square = weights_B.square().sum()
    return torch.where(square > 0, 1 / square.clamp(min=1e-30), 0.0)
