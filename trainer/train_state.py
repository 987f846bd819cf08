"""What the loop itself carries from step to step, and a checkpoint keeps."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class TrainState:
    """Counters and averages of a run. The data cursor is `step`, into `plan`."""

    step: int = 0
    """Steps attempted."""
    applied_steps: int = 0
    """Steps the optimizer applied: the clock of every schedule."""
    tokens: int = 0
    """Target tokens seen, over all ranks."""
    samples: int = 0
    loss_ema: float | None = None
    skipped_in_a_row: int = 0
    recent_losses: list[float] = field(default_factory=list)
    """Mean losses of the last steps, by which a spike is told (trainer/spikes.py)."""
    spikes_in_a_row: int = 0
    rewinds: int = 0
    """How often weights, optimizer and hooks went back to an earlier checkpoint."""
    plan: dict[str, Any] = field(default_factory=dict)
    """Mixtures trained on so far (trainer/data/plan.py), as of the checkpoint."""
