"""Hooks that give runs of a grid a hard time, named in configs by dotted path."""

import os
import signal
import time
from pathlib import Path

from trainer.errors import ConfigError
from trainer.hooks import Hook, RunContext, StepContext, StepResult


class Slow(Hook):
    """Sleeps after each step, so that there is time to strike."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def after_step(self, step: StepContext, result: StepResult) -> None:
        time.sleep(self._seconds)


class DiesOnce(Hook):
    """Kills its process after a step, the first time it runs with this marker file."""

    def __init__(self, marker: str, step: int) -> None:
        self._marker, self._step = Path(marker), step

    def after_step(self, step: StepContext, result: StepResult) -> None:
        if step.step >= self._step and not self._marker.exists():
            self._marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Refuses(Hook):
    """Cannot be started."""

    def on_start(self, run: RunContext) -> None:
        raise ConfigError("hooks.refuses: always refuses")
