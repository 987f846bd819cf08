"""Python's garbage collector, run between steps and at the same steps on every rank.

What nothing refers to any more is freed at once, by counting references; the collector only finds what refers to itself
in a circle. Left alone it starts when enough objects were made, at another moment on every rank, and the rank it stops
is waited for by all others in the next collective. So it is off while the loop trains, and called where no rank is
ahead: for young objects every few steps, for all of them where the run pauses anyway, and now and then if it does not.
"""

import gc
from types import TracebackType

YOUNG_EVERY = 10
"""Steps between collections of the objects made since the last one: a circle lives no longer than that."""
FULL_EVERY = 1000
"""Steps after which everything is looked at, even without an evaluation or a checkpoint."""


class StepGarbage:
    """The collector of this process, in the hands of a training loop while the context is open."""

    def __enter__(self) -> "StepGarbage":
        self._was_enabled = gc.isenabled()
        gc.disable()
        gc.collect()
        gc.freeze()  # what is here now stays: modules, model, data; looking at it would take most of a full collection
        return self

    def after_step(self, step: int, *, paused: bool) -> None:
        """Collect what is due after `step`; `paused`: an evaluation or a checkpoint has just held up every rank."""
        if paused or step % FULL_EVERY == 0:
            gc.collect()
        elif step % YOUNG_EVERY == 0:
            gc.collect(1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()
