"""Strategies: which losses of a batch deserve weight. Pure functions of normalised losses.

A strategy maps h in [-a, a], the position of a sample's loss between the batch's smallest (-a) and largest (a), to a
score; weights are the softmax of score / temperature (Sow et al., ICLR 2025, arXiv 2502.06733, section 4).

Shape letters: B samples of the optimizer step.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Strategy = Callable[[Tensor, float], Tensor]
"""(h_B, a) -> scores_B"""


def linupper(h_B: Tensor, a: float) -> Tensor:
    """min(h + a, a): rises up to the midrange loss, flat above, so that only low losses are down-weighted."""
    return (h_B + a).clamp(max=a)


def quadratic(h_B: Tensor, a: float) -> Tensor:
    """1 - h^2 / a^2: largest at the midrange loss, smallest at both ends."""
    return 1 - (h_B / a).square()


def extremes(h_B: Tensor, a: float) -> Tensor:
    """|h|: largest at both ends."""
    return h_B.abs()


def uniform(h_B: Tensor, a: float) -> Tensor:
    """Constant: every sample alike."""
    return torch.zeros_like(h_B)


STRATEGIES: dict[str, Strategy] = {
    "linupper": linupper,
    "quadratic": quadratic,
    "extremes": extremes,
    "uniform": uniform,
}
