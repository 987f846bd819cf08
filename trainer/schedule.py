"""The learning rate as a pure function of the steps applied so far."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Warm-up, then a decay from the peak to a share of it."""

    shape: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Decay after warm-up; wsd (warm-up, stable, decay) holds the peak and decays linearly over the last steps."""
    warmup_steps: int = 100
    """Steps of linear warm-up from zero."""
    final_fraction: float = 0.1
    """Learning rate at the last step, relative to the peak; without effect on constant."""
    decay_steps: int = 0
    """Length of the decay at the end of a wsd schedule."""

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        found = []
        if self.warmup_steps < 0:
            found.append(f"warmup_steps: {self.warmup_steps} is negative")
        if not 0 <= self.final_fraction <= 1:
            found.append(f"final_fraction: {self.final_fraction} must be in [0, 1]")
        if self.shape == "wsd" and self.decay_steps < 1:
            found.append("decay_steps: a wsd schedule needs at least 1")
        if self.shape != "wsd" and self.decay_steps:
            found.append(f"decay_steps: only shape wsd decays over given steps, not {self.shape}; remove it")
        return found

    def step_problems(self, total_steps: int) -> list[str]:
        """What does not fit into a run of `total_steps`."""
        needed = self.warmup_steps + (self.decay_steps if self.shape == "wsd" else 0)
        if needed <= total_steps:
            return []
        return [f"warmup_steps: warm-up and decay take {needed} steps, the run has {total_steps}; shorten them"]


def learning_rate(config: ScheduleConfig, applied_steps: int, *, peak: float, total_steps: int) -> float:
    """Learning rate of the update that follows `applied_steps` applied ones.

    Warm-up is peak * (n + 1) / warmup_steps, so that the first update moves; the decay reaches
    peak * final_fraction at n = total_steps - 1 and stays there.
    """
    if applied_steps < config.warmup_steps:
        return peak * (applied_steps + 1) / config.warmup_steps
    start = total_steps - config.decay_steps if config.shape == "wsd" else config.warmup_steps
    done = min(max((applied_steps - start + 1) / max(total_steps - start, 1), 0.0), 1.0)
    if config.shape == "constant":
        remaining = 1.0
    elif config.shape == "cosine":
        remaining = 0.5 * (1.0 + math.cos(math.pi * done))
    else:
        remaining = 1.0 - done
    return peak * (config.final_fraction + (1.0 - config.final_fraction) * remaining) if remaining < 1.0 else peak
