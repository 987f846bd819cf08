"""How everything is timed: CPU time on one thread, tasks in turn, minimum and median of several rounds."""

import ctypes
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple


class Timing(NamedTuple):
    """CPU seconds of one task."""

    minimum: float
    median: float


def interleaved(tasks: dict[str, Callable[[], object]], *, rounds: int, warm_up: int = 1) -> dict[str, Timing]:
    """Time the tasks in turn, so that what else the machine does meets all of them alike."""
    spent: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds + warm_up):
        for name, task in tasks.items():
            begin = time.process_time()
            task()
            if number >= warm_up:
                spent[name].append(time.process_time() - begin)
    return {name: Timing(min(values), statistics.median(values)) for name, values in spent.items()}


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed instead of returning it to the kernel; True if it took the setting.

    By default every tensor of some MB is mapped and zeroed anew each time, at about a microsecond a page: a tax that
    grows with the temporaries of an implementation and says nothing of its arithmetic. Without it the peers, which
    make more of them, stand in their best light too. Settings are M_MMAP_MAX = 0 and M_TRIM_THRESHOLD = the maximum.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(key, value) == 1 for key, value in ((-4, 0), (-1, 2**31 - 1)))
