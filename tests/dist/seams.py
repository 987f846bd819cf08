"""What a test changes in a training process before it starts, by name: things that no configuration can ask for."""

from collections.abc import Callable
from typing import Any

import torch

import trainer.memory
from moe.model import MoEDecoder
from trainer.data.corpus import IGNORED_LABEL, Rows, TokenCorpus
from trainer.data.order import Integers
from trainer.data.plan import SamplePlan

BATCH = 8  # samples of a step in the tests
MASKED_EVERY = BATCH


def no_free_memory() -> None:
    """Only one graph fits: the one that is needed anyway."""
    trainer.memory._free_bytes = lambda device: 0


def memory_for_two_more() -> None:
    """Three graphs fit, of however many there are."""
    used = iter(range(0, 10**9, 100))
    trainer.memory._used_bytes = lambda device: next(used)
    trainer.memory._free_bytes = lambda device: 250  # 80 % of it holds two graphs of 100


def masked_samples() -> None:
    """Samples 2, 3, 6 and 7 of every eight have no target: with two ranks and micro-batches of 2, all of rank 1's."""
    original = TokenCorpus.train_batch

    def train_batch(self: TokenCorpus, samples_S, located=None) -> Rows:  # type: ignore[no-untyped-def]
        rows = original(self, samples_S, located)
        masked_S = torch.from_numpy((samples_S % MASKED_EVERY) % 4 >= 2)
        rows.labels_ST[masked_S] = IGNORED_LABEL
        return rows

    TokenCorpus.train_batch = train_batch  # type: ignore[method-assign]


def uneven_samples() -> None:
    """Sample i of a step keeps its first 4 (i + 1) targets: lengths differ, and so do losses of rows and of tokens."""
    original = TokenCorpus.train_batch

    def train_batch(self: TokenCorpus, samples_S, located=None) -> Rows:  # type: ignore[no-untyped-def]
        rows = original(self, samples_S, located)
        for row, sample in enumerate(samples_S):
            rows.labels_ST[row, 4 * (sample % MASKED_EVERY + 1) :] = IGNORED_LABEL
        return rows

    TokenCorpus.train_batch = train_batch  # type: ignore[method-assign]


def third_batch_left_out() -> None:
    """The data of every step from the third on is that of the step after it."""
    original = SamplePlan.locate

    def locate(self: SamplePlan, samples_S: Integers) -> tuple[Integers, Integers]:
        return original(self, samples_S + BATCH * (samples_S >= 2 * BATCH))

    SamplePlan.locate = locate  # type: ignore[method-assign]


def idle_parameter() -> None:
    """The model has a matrix of ones that no loss depends on."""
    original = MoEDecoder.__init__

    def __init__(self: MoEDecoder, *args: Any, **settings: Any) -> None:
        original(self, *args, **settings)
        self.idle = torch.nn.Parameter(torch.ones(4, 4))

    MoEDecoder.__init__ = __init__  # type: ignore[method-assign]


SEAMS: dict[str, Callable[[], None]] = {
    each.__name__: each
    for each in (
        no_free_memory,
        memory_for_two_more,
        masked_samples,
        uneven_samples,
        third_batch_left_out,
        idle_parameter,
    )
}
