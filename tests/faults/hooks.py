"""A hook that watches the process it runs in."""

import psutil

from trainer.hooks import Hook, StepContext, StepResult


class Memory(Hook):
    """Records the resident memory of this process, in MiB."""

    def after_step(self, step: StepContext, result: StepResult) -> None:
        step.record("test/rss_mib", psutil.Process().memory_info().rss / 2**20, "max")
