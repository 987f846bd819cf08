"""Worker processes that take tasks and give results back in the order of the tasks.

Workers are spawned, not forked: this process has threads of torch, Arrow and tokenizers. A spawned worker imports
only what its tasks name, if the main module imports the rest inside its `main`.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from types import TracebackType
from typing import Generic, TypeVar

from trainer.errors import PeerLostError

T = TypeVar("T")
R = TypeVar("R")
K = TypeVar("K", covariant=True)
_THREADS = "TOKENIZERS_PARALLELISM"
_TASKS_AHEAD = 2  # for each worker: what bounds the memory that waiting tasks take


class Done(Generic[K]):
    """A result that needs no work; it keeps its place among the tasks."""

    def __init__(self, value: K) -> None:
        self.value = value


class WorkerPool:
    """`workers` processes; with one, tasks run in this process. A worker uses one core."""

    def __init__(self, workers: int) -> None:
        assert workers > 0
        self._workers = workers
        self._executor: ProcessPoolExecutor | None = None
        self._threads: str | None = None

    def __enter__(self) -> "WorkerPool":
        if self._workers > 1:
            self._executor = ProcessPoolExecutor(
                self._workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
            )
        else:
            self._threads = os.environ.get(_THREADS)
            os.environ[_THREADS] = "false"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
        elif self._threads is None:
            del os.environ[_THREADS]
        else:
            os.environ[_THREADS] = self._threads

    def ordered(self, function: Callable[[T], R], tasks: Iterable[T | Done[K]]) -> Iterator[R | K]:
        """`function` of each task, in order; tasks are taken only a few ahead.

        An error comes at its place: of the function, or of `tasks`, once all results before it are out.
        Raises PeerLostError if a worker is killed.
        """
        waiting: deque[Future[R] | Done[R | K]] = deque()
        source = iter(tasks)
        failure: Exception | None = None
        is_open = True
        while is_open or waiting:
            try:
                while is_open and len(waiting) < self._workers * _TASKS_AHEAD:
                    task = next(source)
                    waiting.append(task if isinstance(task, Done) else self._submit(function, task))
            except StopIteration:
                is_open = False
            except Exception as error:
                is_open, failure = False, error
            if waiting:
                first = waiting.popleft()
                yield first.value if isinstance(first, Done) else _result(first)
        if failure is not None:
            raise failure

    def _submit(self, function: Callable[[T], R], task: T) -> "Future[R] | Done[R]":
        if self._executor is None:
            return Done(function(task))
        try:
            return self._executor.submit(function, task)
        except BrokenProcessPool as error:
            raise _worker_lost() from error


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _result(future: "Future[R]") -> R:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise _worker_lost() from error


def _worker_lost() -> PeerLostError:
    return PeerLostError(
        "a worker process died (killed, or out of memory?); start again, with fewer --workers if memory is short"
    )


def _start_worker() -> None:
    """One core a worker; an interrupt is the parent's business; without a parent there is nothing to work for."""
    os.environ[_THREADS] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
