"""Where the time of a step goes: at every moment exactly one phase is on, and switching costs a microsecond.

    data | forward | losses | hooks | backward | optimizer | other

Decisions:
- The coarse phases are always measured: a few dozen switches a step.
- On a CPU a switch reads the clock. On CUDA it records an event, and nothing waits: the device's own times are read
  when the metrics are, at a moment when the host has waited for the device anyway.
- Phases exclude each other: one that is entered inside another takes its time away from it, so that all add up to the
  step.
- A name may have parts, `forward/attention`: trainer/breakdown.py switches between them, only where it was asked for.
"""

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import TracebackType

import torch
from torch import Tensor
from torch.profiler import record_function

OTHER = "other"
MARK = "phase: "
"""What a trace calls the moment at which a phase begins, before its name."""
PHASES = ("data", "forward", "losses", "hooks", "backward", "optimizer", OTHER)
"""`losses`: those of samples, and their all-gather, which waits for the slowest rank. `backward` and `optimizer` are
DeepSpeed's, with what they reduce and gather between ranks."""

Marks = Sequence[tuple[str, "float | torch.cuda.Event"]]
"""Phases of one step in their order, each with the moment it began; the last one ends the step and has no name."""


class PhaseClock:
    """Splits the time of each step into phases."""

    def __init__(self, device: torch.device) -> None:
        self._now: Callable[[], float | torch.cuda.Event] = time.perf_counter if device.type != "cuda" else _event
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._last: Marks = ()
        self._busy_s = 0.0
        self.is_running = False
        self.is_traced = False
        """Whether phases also go into the trace of a running torch profiler, as ranges."""

    @property
    def current(self) -> str:
        """The phase that is on."""
        return self._marks[-1][0]

    def start(self, phase: str = "data") -> None:
        """A step begins, with this phase."""
        self._marks = [(phase, self._now())]
        self.is_running = True

    def stop(self) -> Marks:
        """The step ends; its marks, to be given to `seconds` once the device is known to have passed them."""
        self._marks.append(("", self._now()))
        self.is_running = False
        self._last = self._marks
        return self._marks

    def switch(self, phase: str) -> str:
        """From now on this phase is on; returns the one before. Between two steps nothing happens."""
        if not self.is_running:
            return OTHER
        previous = self._marks[-1][0]
        self._marks.append((phase, self._now()))
        if self.is_traced:  # where a part begins: parts of a backward begin in one operation and end in another
            with record_function(f"{MARK}{phase}"):
                pass
        return previous

    def phase(self, name: str) -> "_Phase":
        """`with clock.phase("forward"):` the phase is on inside, and the one before comes back."""
        return _Phase(self, name)

    def busy_s(self) -> float:
        """Seconds this rank needed from the start of a step up to here, without waiting for other ranks.

        On CUDA those of the step before, data and forward: what this one does is not known yet to the host.
        """
        if not self._marks:
            return 0.0
        began = self._marks[0][1]
        if isinstance(began, float):
            return time.perf_counter() - began if self.is_running else 0.0
        if self._last and self._last[-1][1].query():  # type: ignore[union-attr]
            times = seconds(self._last)
            self._busy_s = sum(s for name, s in times.items() if name.startswith(("data", "forward")))
        return self._busy_s


class _Phase:
    """A context manager without a generator: there are dozens of them a step."""

    __slots__ = ("_clock", "_name", "_previous", "_range")

    def __init__(self, clock: PhaseClock, name: str) -> None:
        self._clock, self._name = clock, name

    def __enter__(self) -> None:
        self._range = None
        if self._clock.is_traced:
            self._range = record_function(self._name)
            self._range.__enter__()
        self._previous = self._clock.switch(self._name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clock.switch(self._previous)
        if self._range is not None:
            self._range.__exit__(kind, error, trace)


def seconds(marks: Marks) -> dict[str, float]:
    """Seconds of every phase, by its full name, in the order of their first moments."""
    total: dict[str, float] = {}
    for (name, began), (_, ended) in pairwise(marks):
        total[name] = total.get(name, 0.0) + _between(began, ended)
    return total


def metrics(marks: Marks) -> dict[str, float]:
    """The row's `time/..._s`: every coarse phase, and the parts of those that have some.

    What a divided phase does outside its parts is `engine`: DeepSpeed's own work around the model.
    """
    by_name = seconds(marks)
    row = {f"time/{phase}_s": 0.0 for phase in PHASES}
    divided = {name.partition("/")[0] for name in by_name if "/" in name}
    for name, value in by_name.items():
        coarse = name.partition("/")[0]
        row[f"time/{coarse}_s"] = row.get(f"time/{coarse}_s", 0.0) + value
        if coarse in divided:
            part = name if "/" in name else f"{name}/engine"
            row[f"time/{part}_s"] = row.get(f"time/{part}_s", 0.0) + value
    return row


def _between(began: "float | torch.cuda.Event", ended: "float | torch.cuda.Event") -> float:
    if isinstance(began, torch.cuda.Event):
        return began.elapsed_time(ended) / 1e3  # type: ignore[arg-type]
    return ended - began  # type: ignore[operator]


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


_cut: Callable[[str, Tensor], None] | None = None


def cut(part: str, tensor: Tensor) -> Tensor:
    """`tensor`, unchanged: what is done with it counts as `part` of the forward, and of the backward up to here.

    For functions that a breakdown shall divide and that are no modules; without a breakdown it does nothing.
    """
    if _cut is not None:
        _cut(part, tensor)
    return tensor


def set_cut(action: Callable[[str, Tensor], None] | None) -> None:
    """What `cut` does in this process: the breakdown's affair."""
    global _cut
    _cut = action
