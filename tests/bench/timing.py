"""How everything is timed: tasks in turn, minimum and median of several rounds.

On a CPU by CPU time on one thread; on a GPU by its own clock, between two events.
"""

import ctypes
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

Stopwatch = Callable[[Callable[[], object]], float]
"""Runs a task and returns the seconds it took."""

CPU = torch.device("cpu")
_FLUSH_BYTES = 2**28  # twice the largest level-2 cache (B200's 126 MB)


class Timing(NamedTuple):
    """Seconds of one task."""

    minimum: float
    median: float


def cpu_seconds(task: Callable[[], object]) -> float:
    """CPU time of this process."""
    begin = time.process_time()
    task()
    return time.process_time() - begin


def stopwatch(device: torch.device) -> Stopwatch:
    """CPU time, or on a GPU the time between an event before the task and one after it."""
    if device.type != "cuda":
        return cpu_seconds
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)

    def device_seconds(task: Callable[[], object]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # Nobody finds the cache warm, and the host gets a start: its first launches are not timed as the device's.
        flush.zero_()
        begin.record()
        task()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return device_seconds


def interleaved(
    tasks: dict[str, Callable[[], object]], *, rounds: int, warm_up: int = 1, watch: Stopwatch = cpu_seconds
) -> dict[str, Timing]:
    """Time the tasks in turn, so that what else the machine does meets all of them alike."""
    spent: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds + warm_up):
        for name, task in tasks.items():
            seconds = watch(task)
            if number >= warm_up:
                spent[name].append(seconds)
    return {name: Timing(min(values), statistics.median(values)) for name, values in spent.items()}


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed instead of returning it to the kernel; True if it took the setting.

    By default every tensor of some MB is mapped and zeroed anew each time, at about a microsecond a page: a tax that
    grows with the temporaries of an implementation and says nothing of its arithmetic. Without it the peers, which
    make more of them, stand in their best light too. Settings are M_MMAP_MAX = 0 and M_TRIM_THRESHOLD = the maximum.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(key, value) == 1 for key, value in ((-4, 0), (-1, 2**31 - 1)))
