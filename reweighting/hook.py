"""Dynamic loss-based sample reweighting as a hook (Sow et al., ICLR 2025, arXiv 2502.06733).

It sees the losses of every sample of the optimizer step, over all ranks and micro-batches, before the first backward,
and sets one weight a sample. It has no state: weights depend on this step's losses and the number of applied steps.

Shape letters: B samples of the optimizer step.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from reweighting.strategies import STRATEGIES
from reweighting.temperature import TemperatureConfig, temperature
from reweighting.weighing import effective_sample_size, sample_weights
from trainer.hooks import Hook, StepContext


@dataclass(frozen=True, kw_only=True)
class SampleReweightConfig:
    """Which samples get more weight, and how sharply."""

    strategy: Literal["linupper", "quadratic", "extremes", "uniform"] = "linupper"
    """Score of a loss by its place between the batch's smallest and largest."""
    alpha: float = 1.0
    """Half-width of the normalised losses."""
    temperature: TemperatureConfig = field(default_factory=TemperatureConfig)

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        found = [f"temperature.{line}" for line in self.temperature.problems()]
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            found.append(f"alpha: {self.alpha} must be finite and positive")
        return found


class SampleReweightHook(Hook):
    """Owns the sample weights of a step."""

    Config = SampleReweightConfig
    owns = frozenset({"weights"})
    needs_batch_losses = True

    def __init__(self, config: SampleReweightConfig) -> None:
        self._config = config

    def on_losses(self, step: StepContext) -> None:
        """Set the weights of the whole step."""
        config = self._config
        r = temperature(config.temperature, step.applied_steps)
        weights_B = sample_weights(
            step.losses_B, step.valid_B, STRATEGIES[config.strategy], alpha=config.alpha, temperature=r
        )
        step.weights_B = weights_B
        num_valid = step.valid_B.sum()
        step.record("reweight/ess", effective_sample_size(weights_B) / num_valid)
        step.record("reweight/max_weight", weights_B.max() * num_valid)
        step.record("reweight/temperature", r)
