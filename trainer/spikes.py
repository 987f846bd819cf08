"""Loss spikes: when a step's loss is one, and what is done about it.

Decisions:
- What is normal is the median of the last losses, and how far they scatter their median deviation from it: the spikes
  themselves hardly move either, and a loss that stays high becomes the normal after half a window.
- `skip` drops the step before the optimizer moves, like a step that is not finite (OLMo-core's SkipStepOptimizer has
  the idea, with mean and standard deviation). Its samples are consumed.
- `rewind` skips too; but where several steps in a row are spikes the damage was done before them. Then weights,
  optimizer and hooks go back to a checkpoint from before, while the data goes on (Chowdhery et al. 2022, PaLM, section
  5.1): the steps in between become skipped ones after the fact, each of their samples consumed once.
- Spikes that come before there is a checkpoint old enough (at the start of a run, soon after a restart) are skipped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from trainer.train_state import TrainState

_SIGMA_OF_MAD = 1.4826  # standard deviation over median absolute deviation, of a normal distribution


@dataclass(frozen=True, kw_only=True)
class SpikeConfig:
    """What is a loss spike, and what follows."""

    policy: Literal["off", "log", "skip", "rewind"] = "log"
    """`log` only tells; `skip` drops the step; `rewind` drops it and, after `patience` in a row, goes back."""
    window: int = 128
    """Losses that say what is normal; nothing is a spike before there are so many."""
    deviations: float = 6.0
    """Standard deviations above the median that make a spike."""
    least_rise: float = 0.1
    """Nats above the median that a spike has at least, however little the losses scatter."""
    patience: int = 5
    """Spikes in a row after which `rewind` goes back."""
    rewind_steps: int = 100
    """Steps that the checkpoint to go back to is older than the first of those spikes, at least. Without such a
    checkpoint the spikes are skipped."""
    max_rewinds: int = 3
    """Rewinds of a run; one more is the end (exit 4)."""

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        found = []
        for name, least in (("window", 8), ("patience", 1), ("rewind_steps", 0), ("max_rewinds", 1)):
            if getattr(self, name) < least:
                found.append(f"{name}: {getattr(self, name)} must be at least {least}")
        for name in ("deviations", "least_rise"):
            if not 0 < getattr(self, name) < float("inf"):
                found.append(f"{name}: {getattr(self, name)} must be positive and finite")
        most = (self.window + 1) // 2
        if self.policy == "rewind" and self.patience > most:
            found.append(
                f"patience: a loss that stays high is the normal after half a window, {most} spikes in a row, before "
                f"{self.patience} could make the run go back; lower this or raise window"
            )
        return found

    @property
    def reach(self) -> int:
        """Steps that the oldest checkpoint kept must be older than the newest, for one to be old enough at a rewind.

        The newest may be of the last spike but one, `patience` - 2 steps after the first; the oldest has to be of
        `rewind_steps` before the first.
        """
        return self.rewind_steps + self.patience - 2


def spike_limit(losses: Sequence[float], config: SpikeConfig) -> float:
    """The loss above which a step is a spike after `losses`, the last `config.window` at most; infinite if too few."""
    if len(losses) < config.window:
        return float("inf")
    middle = median(losses)
    scatter = _SIGMA_OF_MAD * median(abs(loss - middle) for loss in losses)
    return middle + max(config.deviations * scatter, config.least_rise)


class SpikeWatch:
    """Judges each step of a run by those before it, which `state` holds."""

    def __init__(self, config: SpikeConfig, state: TrainState) -> None:
        self._config, self._state = config, state
        self._is_given_up = False

    def judge(self, loss: float) -> tuple[bool, str]:
        """Whether a step of this finite mean loss is a spike, and why it must not be applied (empty if it may be)."""
        if self._config.policy == "off":
            return False, ""
        limit = spike_limit(self._state.recent_losses, self._config)
        if loss <= limit:
            return False, ""
        reason = f"loss {loss:.4f} is a spike, above {limit:.4f}"
        return True, "" if self._config.policy == "log" else reason

    def note(self, loss: float | None, *, is_spike: bool) -> None:
        """Remember a step. `loss`: None if it was not finite."""
        state = self._state
        state.spikes_in_a_row = state.spikes_in_a_row + 1 if is_spike else 0
        self._is_given_up &= is_spike
        if loss is not None and self._config.policy != "off":
            state.recent_losses = [*state.recent_losses, loss][-self._config.window :]

    @property
    def asks_to_rewind(self) -> bool:
        """Whether the last steps call for going back."""
        is_due = self._config.policy == "rewind" and self._state.spikes_in_a_row >= self._config.patience
        return is_due and not self._is_given_up

    def give_up(self) -> None:
        """There is no way back from the spikes in a row so far, nor from further ones of this row."""
        self._is_given_up = True
