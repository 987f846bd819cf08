"""Weights of single tokens from their own cross-entropy. Pure functions.

With p = exp(-CE), the probability the model gave the token. Raw weights are divided by their mean over all target
tokens of the optimizer step by the loop; without that a weight below one would just be a smaller learning rate.

Shape letters: any (elementwise).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TokenReweightConfig:
    """Which tokens of a sample get more weight."""

    strategy: Literal["focal", "satimp"] = "focal"
    """`focal`: (1 - p)^gamma, less for what is known (arXiv 1708.02002). `satimp`: p^b1 (1 - p)^b2 (2505.11953)."""
    gamma: float = 1.0
    """`focal`: how quickly weight falls with p."""
    b1: float = 0.5
    """`satimp`: saturation, less for tokens the model gives little probability."""
    b2: float = 0.1
    """`satimp`: importance, less for tokens it is sure of; the peak is at p = b1 / (b1 + b2)."""

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        found = []
        default = TokenReweightConfig()
        for name in ("gamma", "b1", "b2"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                found.append(f"{name}: {value} must be finite and not negative")
            if value != getattr(default, name) and (name == "gamma") != (self.strategy == "focal"):
                found.append(f"{name}: {self.strategy} does not read it; remove it")
        return found


def token_weights(losses: Tensor, config: TokenReweightConfig) -> Tensor:
    """Raw weight of each token from its cross-entropy, float32, same shape."""
    losses = losses.float()
    # 1 - exp(-x) without cancellation; powers through logarithms of what is at least a rounding error away from 0.
    unsure = -torch.expm1(-losses)
    if config.strategy == "focal":
        return unsure.clamp(min=0).pow(config.gamma)
    return (-config.b1 * losses).exp() * unsure.clamp(min=0).pow(config.b2)
