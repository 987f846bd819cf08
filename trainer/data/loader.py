"""Micro-batches for one rank, step by step, from any step on.

Step s (from 0) trains on samples [s * GB, (s + 1) * GB), whatever the ranks. Micro-batch m of rank r holds the rows
(m * W + r) * b ... + b of them: with W ranks and M micro-batches of b the same GB samples are only dealt differently.

Shape letters: b samples of a micro-batch, T sequence, W ranks, M micro-batches.
"""

import signal
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trainer.data.corpus import TokenCorpus


class MicroBatch(NamedTuple):
    """What one forward sees."""

    sample_ids_b: Tensor
    domains_b: Tensor
    tokens_bT: Tensor
    labels_bT: Tensor
    documents_bT: Tensor  # number of each token's document in its domain's shard; -1 at padding

    def to(self, device: torch.device) -> "MicroBatch":
        """A copy on `device`; asynchronous from pinned memory."""
        return MicroBatch(*(tensor.to(device, non_blocking=True) for tensor in self))


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
        pin_memory: bool = False,
    ) -> None:
        assert global_batch_size % (micro_batch_size * world_size) == 0
        self._corpus = corpus
        self._num_micro_batches = global_batch_size // (micro_batch_size * world_size)
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._rank, self._world_size = rank, world_size
        self._num_workers, self._pin_memory = num_workers, pin_memory

    def batches(self, start_step: int) -> Iterator[list[MicroBatch]]:
        """The M micro-batches of each step from `start_step` on, without end."""
        micro_batches = iter(
            DataLoader(
                _Rows(self._corpus),
                sampler=_Windows(self, start_step),
                batch_size=None,  # an item is a whole micro-batch already
                num_workers=self._num_workers,
                pin_memory=self._pin_memory,
                # A generator of its own: by default it draws a seed from the global one, so that a run that opens
                # the loader twice (once more after a crash) would see other dropout masks.
                generator=torch.Generator(),
                worker_init_fn=_leave_signals_to_the_trainer if self._num_workers else None,
                prefetch_factor=2 * self._num_micro_batches if self._num_workers else None,
            )
        )
        while True:
            yield [next(micro_batches) for _ in range(self._num_micro_batches)]

    def sample_ids(self, step: int, micro_batch: int) -> NDArray[np.int64]:
        """Numbers of the samples of one micro-batch of this rank."""
        first = step * self._global_batch_size
        first += (micro_batch * self._world_size + self._rank) * self._micro_batch_size
        return np.arange(first, first + self._micro_batch_size)


class _Windows:
    """Sample numbers of one micro-batch after the other."""

    def __init__(self, loader: TrainLoader, start_step: int) -> None:
        self._loader, self._start = loader, start_step

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        step = self._start
        while True:
            for micro_batch in range(self._loader._num_micro_batches):
                yield self._loader.sample_ids(step, micro_batch)
            step += 1


class _Rows(Dataset[MicroBatch]):
    """Maps the sample numbers of a micro-batch to the micro-batch."""

    def __init__(self, corpus: TokenCorpus) -> None:
        self._corpus = corpus

    def __getitem__(self, samples_b: NDArray[np.int64]) -> MicroBatch:
        rows = self._corpus.train_batch(samples_b)
        return MicroBatch(
            torch.from_numpy(samples_b), rows.domains_S, rows.tokens_ST, rows.labels_ST, rows.documents_ST
        )


def _leave_signals_to_the_trainer(worker_id: int) -> None:
    # A SIGTERM to the whole process group must not take the data away before the last step and its checkpoint.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
