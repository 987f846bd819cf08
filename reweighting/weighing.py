"""Sample weights from the losses of a whole optimizer step. Pure functions; nothing waits for the device.

Everything is float32 or better, over ALL samples of the step: normalising by rank or micro-batch would be another
objective. Samples without target tokens (`valid_B` False) enter no statistic and get weight zero.

Shape letters: B samples of the optimizer step, G grid points of a search.
"""

import torch
from torch import Tensor

from reweighting.reference import LossRange, batch_range, normalized_losses
from reweighting.strategies import Strategy

_ESS_GRID, _ESS_ROUNDS = 33, 4  # resolution of the sharpness: 32^-4, about 1e-6


def sample_scores(losses_B: Tensor, valid_B: Tensor, strategy: Strategy, alpha: float, ends: LossRange) -> Tensor:
    """Score of each sample, [B]; 0 where invalid, and everywhere if a normalised strategy has no spread to go by."""
    if not strategy.normalized:
        return torch.where(valid_B, strategy.score(losses_B, alpha), 0.0)
    scores_B = strategy.score(normalized_losses(losses_B, valid_B, ends, alpha), alpha)
    return torch.where(valid_B & ends.is_spread, scores_B, 0.0)


def sample_weights(
    losses_B: Tensor,
    valid_B: Tensor,
    strategy: Strategy,
    *,
    alpha: float,
    temperature: float,
    ends: LossRange | None = None,
    cap: float = 0.0,
    ess_floor: float = 0.0,
) -> Tensor:
    """softmax(score / temperature) over valid samples, [B]: sums to one, exactly zero where invalid.

    `ends`: the loss scale; None takes the smallest and largest loss of the step, as the paper does.
    `ess_floor`: the temperature is raised until the effective sample size is at least this share of the valid samples.
    `cap`: no weight above cap / (number of valid samples), at least 1; 0 sets no limit.
    Uniform if all losses are the same; all zero if no sample is valid. Losses of valid samples must be finite: the
    loop skips a step where one is not.
    """
    losses_B = losses_B if losses_B.dtype == torch.float64 else losses_B.float()
    ends = batch_range(losses_B, valid_B) if ends is None else ends
    scores_B = sample_scores(losses_B, valid_B, strategy, alpha, ends)
    if ess_floor:
        sharpness = sharpness_for_ess(scores_B, valid_B, 1 / temperature, ess_floor)
        weights_B = softmax_weights(scores_B, valid_B, sharpness)
    else:
        weights_B = softmax_weights(scores_B / temperature, valid_B)
    return cap_weights(weights_B, cap / valid_B.sum().double()) if cap else weights_B


def softmax_weights(scores_B: Tensor, valid_B: Tensor, sharpness: Tensor | float = 1.0) -> Tensor:
    """softmax(sharpness * score) over the last dimension, exactly zero where invalid; all zero if nothing is valid."""
    exponents = torch.where(valid_B, scores_B * sharpness, -torch.inf)
    unnormalized = torch.where(valid_B, (exponents - exponents.amax(-1, keepdim=True)).exp(), 0.0)
    return unnormalized / unnormalized.sum(-1, keepdim=True).clamp(min=1e-30)


def cap_weights(weights_B: Tensor, limit: Tensor | float) -> Tensor:
    """The distribution nearest to `weights_B` (in KL) with no entry above `limit`: min(limit, c w) that sums to one.

    Water-filling: the largest entries are held at the limit, the others grow by one factor. `limit` must be at least
    one over the number of positive entries.
    """
    limit = torch.as_tensor(limit, dtype=torch.float64, device=weights_B.device)
    w_B = weights_B.double()
    descending_B = w_B.sort(descending=True).values
    tails_B = descending_B.flip(0).cumsum(0).flip(0)  # what the entries from here on weigh together
    held_B = torch.arange(w_B.numel(), device=w_B.device)
    factors_B = (1 - held_B * limit) / tails_B.clamp(min=1e-300)
    # The first entry that need not be held when all before it are; the tolerance is for limit = 1/B.
    fits_B = (factors_B * descending_B <= limit * (1 + 1e-9)) & (factors_B >= 0)
    factor = factors_B.take(fits_B.int().argmax())  # not [...], which would ask the device for the index
    return torch.minimum(w_B * factor, limit).to(weights_B.dtype)


def sharpness_for_ess(scores_B: Tensor, valid_B: Tensor, sharpness: float, floor: float) -> Tensor:
    """The largest sharpness (1 / temperature) up to `sharpness` whose effective sample size is `floor` * valid or more.

    The effective sample size falls with the sharpness (it is the exponential of a Renyi entropy of order 2), and is
    all valid samples at zero: so there is one answer, searched on grids without asking the device anything.
    """
    wanted = floor * valid_B.sum().double()  # a float times an integer tensor would be rounded to float32
    low = torch.zeros((), dtype=torch.float64, device=scores_B.device)
    high = torch.full_like(low, sharpness)
    steps_G = torch.linspace(0, 1, _ESS_GRID, dtype=torch.float64, device=scores_B.device)
    for _ in range(_ESS_ROUNDS):
        grid_G = low + (high - low) * steps_G
        weights_GB = softmax_weights(scores_B.double(), valid_B, grid_G.unsqueeze(1))
        enough_G = effective_sample_size(weights_GB) >= wanted
        best = (enough_G.long().cumprod(0).sum() - 1).clamp(min=0)
        low, high = grid_G.take(best), grid_G.take((best + 1).clamp(max=_ESS_GRID - 1))
    return low


def effective_sample_size(weights_B: Tensor) -> Tensor:
    """1 / sum w^2 over the last dimension: how many equally weighted samples have the same variance (Kish 1965).

    0 without weights.
    """
    square = weights_B.square().sum(-1)
    return torch.where(square > 0, 1 / square.clamp(min=1e-30), 0.0)


def divergence(true_B: Tensor, used_B: Tensor) -> Tensor:
    """KL(true || used) of two sets of weights in nats, a scalar; how far frozen weights are from those of the batch."""
    positive_B = true_B > 0
    ratio_B = torch.where(positive_B, true_B / used_B.clamp(min=1e-30), 1.0)
    return (true_B * ratio_B.log()).sum().clamp(min=0)
