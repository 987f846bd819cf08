"""Strategies: which losses of a batch deserve weight. Pure functions.

A strategy maps h in [-a, a], the position of a sample's loss between the reference's low end (-a) and high end (a), to
a score; weights are the softmax of score / temperature (Sow et al., ICLR 2025, arXiv 2502.06733, section 4). `linear`
takes the raw loss instead, which is KL-regularised distributionally robust optimisation at a fixed temperature.

Shape letters: B samples of the optimizer step.
"""

import importlib
from collections.abc import Callable
from difflib import get_close_matches
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.errors import ConfigError

Score = Callable[[Tensor, float], Tensor]
"""(h_B, a) -> scores_B, elementwise"""


class Strategy(NamedTuple):
    """A score function and what it is a function of."""

    score: Score
    normalized: bool = True
    """True if it takes normalised losses h in [-a, a]; False if it takes the losses themselves."""
    depends_on_alpha: bool = True
    """False if scores are the same whatever a is."""


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


def linear(losses_B: Tensor, a: float) -> Tensor:
    """The loss itself: weights solve max_w sum w l - r KL(w || uniform). `a` is not used."""
    return losses_B


STRATEGIES: dict[str, Strategy] = {
    "linupper": Strategy(linupper),
    "quadratic": Strategy(quadratic, depends_on_alpha=False),
    "extremes": Strategy(extremes),
    "uniform": Strategy(uniform, depends_on_alpha=False),
    "linear": Strategy(linear, normalized=False, depends_on_alpha=False),
}


def find_strategy(name: str) -> Strategy:
    """The strategy called `name`, or a user's own score of normalised losses as `package.module:function`.

    Raises ConfigError if there is none, or if it is not an elementwise function (h_B, a) -> finite scores_B.
    """
    if name in STRATEGIES:
        return STRATEGIES[name]
    module_name, _, attribute = name.partition(":")
    if not attribute:
        close = get_close_matches(name, STRATEGIES, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(STRATEGIES)}."
        raise ConfigError(f"unknown strategy '{name}'; {hint} One of your own is named package.module:function")
    try:
        score = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"'{name}' cannot be imported ({error}); is it on PYTHONPATH?") from error
    h_B = torch.linspace(-1, 1, 5)
    try:
        scores_B = score(h_B, 1.0)
        fits = scores_B.shape == h_B.shape and bool(torch.isfinite(scores_B).all())
    except Exception as error:  # it is the user's code: whatever it raises belongs into the message
        raise ConfigError(f"'{name}' fails on normalised losses ({type(error).__name__}: {error})") from error
    if not fits:
        raise ConfigError(f"'{name}' must map normalised losses [B] in [-a, a] to finite scores [B]")
    return Strategy(score)
