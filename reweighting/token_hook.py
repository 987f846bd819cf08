"""Weights of single tokens as a hook. Composes with sample weights: those see unweighted mean losses.

Shape letters: b rows of a micro-batch, T sequence.
"""

from torch import Tensor

from reweighting.tokens import TokenReweightConfig, token_weights
from trainer.hooks import Hook


class TokenReweightHook(Hook):
    """Owns the token weights; the loop divides them by their mean over all target tokens of the step."""

    Config = TokenReweightConfig
    owns = frozenset({"token_weights"})

    def __init__(self, config: TokenReweightConfig) -> None:
        self._config = config

    def token_weights(self, losses_bT: Tensor) -> Tensor:
        """Weight of each token from its cross-entropy, [b, T]."""
        return token_weights(losses_bT, self._config)
