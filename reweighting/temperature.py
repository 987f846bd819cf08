"""The temperature of the weights as a pure function of the steps applied so far."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TemperatureConfig:
    """First nearly uniform, then sharp: losses of an untrained model say little about samples."""

    value: float = 1.0
    """Temperature r after the warm-up; smaller is sharper, infinity would be uniform."""
    warmup_steps: int = 0
    """Steps at `warmup_value` before that."""
    warmup_value: float = 100.0
    """Temperature of the warm-up; 100 is nearly uniform."""

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        found = []
        for name in ("value", "warmup_value"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                found.append(f"{name}: {value} must be finite and positive")
        if self.warmup_steps < 0:
            found.append(f"warmup_steps: {self.warmup_steps} is negative")
        return found


def temperature(config: TemperatureConfig, applied_steps: int) -> float:
    """Temperature of the step that follows `applied_steps` applied ones."""
    return config.warmup_value if applied_steps < config.warmup_steps else config.value
