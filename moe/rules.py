"""Balancing rules: how the bias of one layer follows its experts' loads. Pure functions of tensors.

A rule gets the loads of one whole optimizer step (summed over ranks and micro-batches) and returns the new bias.
Every rule works on the relative error e_i = (mean - c_i) / mean: positive for an expert with too little work,
-1 ... for one with too much. A layer that saw no token keeps its bias.

Shape letters: E experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Rule = Callable[[Tensor, Tensor, float], Tensor]
"""(counts_E, bias_E, rate) -> bias_E, float32."""


def relative_error(counts_E: Tensor) -> Tensor:
    """(mean - c) / mean, float32 [E]; all zero if no token was routed."""
    counts_E = counts_E.double()  # loads of a large batch exceed what float32 counts exactly
    mean = counts_E.mean()
    return torch.where(mean > 0, (mean - counts_E) / mean.clamp(min=1e-300), 0.0).float()


def sign(counts_E: Tensor, bias_E: Tensor, rate: float) -> Tensor:
    """b + u sign(e): a fixed step towards balance (Wang et al. 2024, arXiv 2408.15664, algorithm 1). Scale: none."""
    return bias_E + rate * relative_error(counts_E).sign()


def centered_sign(counts_E: Tensor, bias_E: Tensor, rate: float) -> Tensor:
    """The sign rule with the mean of its step removed, so that the mean bias does not drift. Scale: none.

    Selection sees only differences of biases, so this is the same rule without the component nobody sees.
    """
    step_E = rate * relative_error(counts_E).sign()
    return bias_E + (step_E - step_E.mean())


RULES: dict[str, Rule] = {"sign": sign, "centered_sign": centered_sign}
