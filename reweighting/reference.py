"""Reference statistics: between which losses a sample's loss is placed. Pure functions; nothing waits for the device
(hence `take`: an index that is a tensor of no dimension is read by the host first).

The paper takes the smallest and largest loss of the step, so one outlier moves the midrange for everybody. Quantiles do
not follow outliers, and running quantiles, over a decaying window of past steps, do not jump with the batch either. The
window is a histogram of losses: histograms of parts of a batch add up to that of the whole, whoever counted them.

Shape letters: B samples of the optimizer step, Q bins.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

BINS = 2048
BIN_WIDTH = 0.01
"""Nats. Losses from BINS * BIN_WIDTH = 20.48 on share the last bin; ln of a vocabulary of a million is 13.8."""

_SPREAD_TOLERANCE = 1e-6  # relative to the largest loss: below it, differences between losses are rounding


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """Where the low and the high end of the loss scale come from."""

    kind: Literal["minmax", "quantile", "running"] = "minmax"
    """`minmax` of the step (the paper); `quantile`s of the step; `running` quantiles of the steps before it."""
    quantile: float = 0.05
    """Share of losses below the low end, and above the high end; losses outside count as at the end."""
    decay: float = 0.95
    """`running`: factor on the weight of the past at every applied step; the window is about 1 / (1 - decay) steps."""

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        found = []
        if not 0 <= self.quantile < 0.5:
            found.append(f"quantile: {self.quantile} must be in [0, 0.5)")
        if not 0 <= self.decay < 1:
            found.append(f"decay: {self.decay} must be in [0, 1)")
        default = ReferenceConfig()
        if self.kind == "minmax" and self.quantile != default.quantile:
            found.append("quantile: minmax does not read it; set kind to quantile or running, or remove it")
        if self.kind != "running" and self.decay != default.decay:
            found.append(f"decay: {self.kind} does not read it; set kind to running or remove it")
        return found


class LossRange(NamedTuple):
    """The two ends of the loss scale, scalars on the device; NaN where nothing is known yet."""

    low: Tensor
    high: Tensor

    @property
    def is_spread(self) -> Tensor:
        """Whether the ends lie apart by more than rounding; False for NaN. Bool scalar."""
        return self.high - self.low > _SPREAD_TOLERANCE * self.high.abs().clamp(min=1.0)


def batch_range(losses_B: Tensor, valid_B: Tensor, quantile: float = 0.0) -> LossRange:
    """The `quantile` and 1 - `quantile` of the valid losses, interpolated linearly; 0 gives minimum and maximum."""
    sorted_B = torch.where(valid_B, losses_B, torch.inf).sort().values
    last = (valid_B.sum() - 1).clamp(min=0)

    def at(q: float) -> Tensor:
        position = q * last
        below = position.floor().long()
        a, b = sorted_B.take(below), sorted_B.take(torch.minimum(below + 1, last))
        return torch.where(valid_B.any(), torch.lerp(a, b, (position - below).to(a.dtype)), torch.nan)

    return LossRange(at(quantile), at(1 - quantile))


def normalized_losses(losses_B: Tensor, valid_B: Tensor, ends: LossRange, alpha: float) -> Tensor:
    """h_B = alpha (2 (l - low) / (high - low) - 1), held within [-alpha, alpha] (arXiv 2502.06733, equation 7).

    Where the ends do not lie apart, and at invalid samples, h is 0.
    """
    is_spread = ends.is_spread
    spread = torch.where(is_spread, ends.high - ends.low, 1.0)
    h_B = alpha * (2 * (losses_B - ends.low) / spread - 1)
    return torch.where(valid_B & is_spread, h_B.clamp(-alpha, alpha), 0.0)


def loss_histogram(losses_B: Tensor, valid_B: Tensor) -> Tensor:
    """How many valid losses fall into each bin, float64 [Q]; histograms of parts add up to that of the whole."""
    bins_B = (torch.where(valid_B, losses_B, 0.0) / BIN_WIDTH).long().clamp(0, BINS - 1)
    return torch.zeros(BINS, dtype=torch.float64, device=losses_B.device).index_add_(0, bins_B, valid_B.double())


def histogram_range(counts_Q: Tensor, quantile: float) -> LossRange:
    """The `quantile` and 1 - `quantile` of a histogram of losses, right to a bin's width; NaN if it is empty."""
    cumulative_Q = counts_Q.cumsum(0)
    total = cumulative_Q[-1]

    def at(q: float) -> Tensor:
        target = q * total
        index = torch.searchsorted(cumulative_Q, target.unsqueeze(0), right=q == 0.0).clamp(max=BINS - 1)[0]
        count = counts_Q.take(index)
        before = cumulative_Q.take(index) - count
        inside = ((target - before) / count.clamp(min=1e-300)).clamp(0, 1)
        return torch.where(total > 0, (index + inside) * BIN_WIDTH, torch.nan)

    return LossRange(at(quantile), at(1 - quantile))
