"""The temperature of the weights as a pure function of the steps applied so far."""

import bisect
import math
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TemperatureConfig:
    """First nearly uniform, then sharp: losses of an untrained model say little about samples."""

    value: float = 1.0
    """Temperature r after the warm-up; smaller is sharper, infinity would be uniform."""
    skip_steps: int = 0
    """First steps, in which all weights are the same."""
    warmup_steps: int = 0
    """Steps at `warmup_value` after those."""
    warmup_value: float = 100.0
    """Temperature of the warm-up; 100 is nearly uniform."""
    shape: Literal["constant", "linear", "cosine", "piecewise"] = "constant"
    """Course after the warm-up: `value` throughout; from `value` to `final` over the rest of the run; or `points`."""
    final: float = 0.0
    """Temperature at the end of the run, for `linear` and `cosine`."""
    points: dict[int, float] = field(default_factory=dict)
    """`piecewise`: temperature at numbers of applied steps, joined by straight lines; constant before and after."""

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        found = []
        for name in ("value", "warmup_value"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                found.append(f"{name}: {value} must be finite and positive")
        for name in ("skip_steps", "warmup_steps"):
            if getattr(self, name) < 0:
                found.append(f"{name}: {getattr(self, name)} is negative")
        falls = self.needs_length
        if falls and not (math.isfinite(self.final) and self.final > 0):
            found.append(f"final: {self.final} must be finite and positive for shape {self.shape}")
        if not falls and self.final:
            found.append(f"final: shape {self.shape} does not read it; remove it")
        if self.shape == "piecewise":
            if not self.points:
                found.append("points: shape piecewise needs at least one, such as {0: 2.0, 1000: 0.4}")
            found += [f"points.{step}: a number of steps cannot be negative" for step in self.points if step < 0]
            found += [
                f"points.{step}: {value} must be finite and positive"
                for step, value in self.points.items()
                if not (math.isfinite(value) and value > 0)
            ]
            if self.value != TemperatureConfig().value:
                found.append("value: shape piecewise does not read it; remove it")
        elif self.points:
            found.append(f"points: shape {self.shape} does not read them; set shape to piecewise or remove them")
        return found

    @property
    def needs_length(self) -> bool:
        """Whether the course is known only with the length of the run."""
        return self.shape in ("linear", "cosine")


def temperature(config: TemperatureConfig, applied_steps: int, total_steps: int = 0) -> float:
    """Temperature of the step that follows `applied_steps` applied ones; infinite where weights are uniform.

    `total_steps`: length of the run, over which `linear` and `cosine` move.
    """
    if applied_steps < config.skip_steps:
        return math.inf
    start = config.skip_steps + config.warmup_steps
    if applied_steps < start:
        return config.warmup_value
    if config.shape == "piecewise":
        return _interpolate(sorted(config.points.items()), applied_steps)
    if config.shape == "constant":
        return config.value
    progress = min((applied_steps - start) / max(total_steps - 1 - start, 1), 1.0)
    if config.shape == "cosine":
        progress = 0.5 * (1 - math.cos(math.pi * progress))
    return config.value + (config.final - config.value) * progress


def _interpolate(points: list[tuple[int, float]], step: int) -> float:
    index = bisect.bisect_right([at for at, _ in points], step)
    if index == 0 or index == len(points):
        return points[max(index - 1, 0)][1]
    (left, before), (right, after) = points[index - 1], points[index]
    return before + (after - before) * (step - left) / (right - left)
