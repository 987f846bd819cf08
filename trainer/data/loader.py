"""Micro-batches for one rank, step by step, from any step on.

Step s (from 0) trains on samples [s * GB, (s + 1) * GB), whatever the ranks. Micro-batch m of rank r holds the rows
(m * W + r) * b ... + b of them: with W ranks and M micro-batches of b the same GB samples are only dealt differently.

Decisions:
- The training process asks the plan which row each sample is, at most `prefetch_steps` ahead; workers only read rows.
  So what is read ahead does not depend on the number of workers, and nothing has to tell them of a change.
- A worker that dies (kill -9, out of memory) ends nothing: all workers are started again from the next micro-batch, and
  the data is the same. If that fails three times in a row the training process reads by itself from there on.

Shape letters: b samples of a micro-batch, T sequence, W ranks, M micro-batches.
"""

import gc
import logging
import re
import signal
import threading
from collections.abc import Generator, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trainer.data.corpus import TokenCorpus
from trainer.data.order import Integers, sample_digests

log = logging.getLogger("evenkeel")

_RESTARTS = 3  # in a row, with no micro-batch in between
_WORKER_DIED = re.compile(r"DataLoader worker \(pid.* (exited unexpectedly|is killed by signal)")


class MicroBatch(NamedTuple):
    """What one forward sees."""

    sample_ids_b: Tensor
    domains_b: Tensor
    tokens_bT: Tensor
    labels_bT: Tensor
    documents_bT: Tensor  # number of each token's document in its domain's shard; -1 at padding
    digests_b: Tensor  # int64, 32 bits of (sample, domain, row): the run records what it trained on

    def to(self, device: torch.device) -> "MicroBatch":
        """A copy on `device`; asynchronous from pinned memory."""
        return MicroBatch(*(tensor.to(device, non_blocking=True) for tensor in self))

    def flat(self) -> Integers:
        """All in one array, int64: what a worker hands over costs by the piece."""
        return torch.cat([tensor.flatten() for tensor in self]).numpy()

    @classmethod
    def of(cls, flat: Tensor | Integers, num_samples: int) -> "MicroBatch":
        """What `flat` was made of, as views."""
        flat = torch.as_tensor(flat)
        length = flat.numel() // (3 * num_samples) - 1
        sizes = [num_samples * (length if name.endswith("_bT") else 1) for name in cls._fields]
        parts = zip(cls._fields, flat.split(sizes), strict=True)
        return cls(*(part.view(num_samples, length) if name.endswith("_bT") else part for name, part in parts))


class Request(NamedTuple):
    """One micro-batch to read."""

    samples_b: Integers
    domains_b: Integers
    rows_b: Integers


class TrainLoader:
    """The samples of one rank."""

    def __init__(
        self,
        corpus: TokenCorpus,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        num_workers: int = 0,
        prefetch_steps: int = 2,
        pin_memory: bool = False,
    ) -> None:
        assert global_batch_size % (micro_batch_size * world_size) == 0
        self._corpus = corpus
        self._num_micro_batches = global_batch_size // (micro_batch_size * world_size)
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._rank, self._world_size = rank, world_size
        self._num_workers, self._pin_memory = num_workers, pin_memory
        self._ahead = prefetch_steps * self._num_micro_batches

    def batches(self, start_step: int) -> Generator[list[MicroBatch], None, None]:
        """The M micro-batches of each step from `start_step` on, as long as the plan has samples."""
        micro_batches = self._micro_batches(start_step * self._num_micro_batches)
        while step := list(islice(micro_batches, self._num_micro_batches)):
            yield step

    def _micro_batches(self, first: int) -> Iterator[MicroBatch]:
        """Micro-batches of this rank from one on, counted from the start of the run; workers that die are replaced."""
        num_workers, restarts = self._num_workers, 0
        while True:
            source = self._open(first, num_workers)
            try:
                for flat in source:
                    first, restarts = first + 1, 0
                    yield MicroBatch.of(flat, self._micro_batch_size)
                return
            except Exception as error:
                died = str(error)
                if not _WORKER_DIED.match(died):
                    # What a worker raises says where. Frames of ours would keep the workers until Python exits, which
                    # waits for them, and they for a signal that they ignore.
                    raise (error.with_traceback(None) if num_workers else error) from error.__cause__
                restarts += 1
                step = first // self._num_micro_batches + 1
                if restarts == _RESTARTS:
                    num_workers = 0
                    log.warning("step %d: %s, the third time in a row; reading in the training process", step, died)
                else:
                    log.warning("step %d: %s; workers are started again, with the same data", step, died)
            finally:
                del source  # workers end with it

    def _open(self, first: int, num_workers: int) -> Iterator[Tensor | Integers]:
        # No more requests are out than may be read ahead, however many workers there are.
        num_workers = min(num_workers, self._ahead)
        on_child_death = signal.getsignal(signal.SIGCHLD)
        micro_batches = iter(
            DataLoader(
                _Rows(self._corpus),
                sampler=_Requests(self, first),
                batch_size=None,  # an item is a whole micro-batch already
                # A tensor comes through shared memory, which takes a millisecond of whoever opens it: torch's thread
                # that pins it, or else the trainer. An array comes through a pipe, which takes a tenth of that.
                collate_fn=None if self._pin_memory else _as_it_is,
                num_workers=num_workers,
                pin_memory=self._pin_memory,
                # A generator of its own: by default it draws a seed from the global one, so that a run that opens
                # the loader twice (once more after a crash) would see other dropout masks.
                generator=torch.Generator(),
                worker_init_fn=_start_worker if num_workers else None,
                prefetch_factor=self._ahead // num_workers if num_workers else None,
            )
        )
        if num_workers and on_child_death is not None and threading.current_thread() is threading.main_thread():
            # torch raises a worker's death out of whatever the trainer is doing at that moment, an optimizer step for
            # instance. It notices all the same when it waits for data, and there it can be dealt with.
            signal.signal(signal.SIGCHLD, on_child_death)
        return micro_batches

    def sample_ids(self, step: int, micro_batch: int) -> NDArray[np.int64]:
        """Numbers of the samples of one micro-batch of this rank."""
        first = step * self._global_batch_size
        first += (micro_batch * self._world_size + self._rank) * self._micro_batch_size
        return np.arange(first, first + self._micro_batch_size)


class _Requests:
    """What to read for one micro-batch after the other; the training process iterates over it."""

    def __init__(self, loader: TrainLoader, first: int) -> None:
        self._loader, self._first = loader, first

    def __iter__(self) -> Iterator[Request]:
        loader, plan = self._loader, self._loader._corpus.plan
        num = loader._num_micro_batches
        step, done = divmod(self._first, num)
        while plan.end is None or (step + 1) * loader._global_batch_size <= plan.end:
            # A step is asked for at once, no earlier than its first micro-batch: arithmetic on many costs as on few.
            samples_Mb = np.stack([loader.sample_ids(step, micro_batch) for micro_batch in range(num)])
            located = plan.locate(samples_Mb.ravel())
            domains_Mb, rows_Mb = (each.reshape(samples_Mb.shape) for each in located)
            yield from list(map(Request, samples_Mb, domains_Mb, rows_Mb))[done:]
            step, done = step + 1, 0


class _Rows(Dataset[Integers]):
    """Maps what is asked for to the micro-batch, in one piece."""

    def __init__(self, corpus: TokenCorpus) -> None:
        self._corpus = corpus

    def __getitem__(self, request: Request) -> Integers:
        rows = self._corpus.train_batch(request.samples_b, (request.domains_b, request.rows_b))
        return MicroBatch(
            torch.from_numpy(request.samples_b),
            rows.domains_S,
            rows.tokens_ST,
            rows.labels_ST,
            rows.documents_ST,
            torch.from_numpy(sample_digests(*request)),
        ).flat()


def _as_it_is(flat: Any) -> Any:
    return flat


def _start_worker(worker_id: int) -> None:
    gc.enable()  # off in the trainer, which collects between steps; a worker has none
    # A SIGTERM to the whole process group must not take the data away before the last step and its checkpoint.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
