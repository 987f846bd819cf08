"""Micro-batches: the same for any ranks, workers and depth of prefetching, and when workers die."""

import dataclasses
import logging
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest

from trainer.data.config import DataConfig, PhaseConfig
from trainer.data.corpus import TokenCorpus
from trainer.data.loader import MicroBatch, TrainLoader
from trainer.data.order import sample_digests

BATCH = 8
Samples = dict[int, tuple[int, int, list[int]]]


def opened(config: DataConfig, **changes: object) -> TokenCorpus:
    config = dataclasses.replace(config, **changes)
    return TokenCorpus.open(config, sequence_length=32, seed=5, mask_documents=False, steps=8, global_batch_size=BATCH)


PHASES = [PhaseConfig(from_sample=13, weights={"prose": 1.0}), PhaseConfig(from_step=4, weights={"code": 1.0})]


def loader_of(
    corpus: TokenCorpus, micro: int = 2, rank: int = 0, world: int = 1, workers: int = 0, **more: int
) -> TrainLoader:
    return TrainLoader(
        corpus, global_batch_size=BATCH, micro_batch_size=micro, rank=rank, world_size=world, num_workers=workers,
        **more,
    )  # fmt: skip


def collected(batches: Sequence[MicroBatch]) -> Samples:
    return {
        sample: (int(batch.domains_b[i]), int(batch.digests_b[i]), batch.tokens_bT[i].tolist())
        for batch in batches
        for i, sample in enumerate(batch.sample_ids_b.tolist())
    }


def steps_of(corpus: TokenCorpus, start: int, count: int, micro: int, world: int, workers: int) -> list[Samples]:
    """What all ranks together see, step by step."""
    steps: list[Samples] = [{} for _ in range(count)]
    for rank in range(world):
        batches = loader_of(corpus, micro, rank, world, workers).batches(start)
        for step in steps:
            step.update(collected(next(batches)))
    return steps


def test_steps_are_the_same_for_any_ranks_workers_and_micro_batches(data_config: DataConfig) -> None:
    corpus = opened(data_config, phases=PHASES)
    expected = steps_of(corpus, 0, 6, micro=8, world=1, workers=0)
    for number, step in enumerate(expected):
        ids = np.arange(number * BATCH, (number + 1) * BATCH)
        assert sorted(step) == ids.tolist()
        domains, rows = corpus.plan.locate(ids)
        assert [step[i][1] for i in ids] == sample_digests(ids, domains, rows).tolist(), "digests are of what is read"
    for world in (1, 2, 4):
        for workers in (0, 2):
            assert steps_of(corpus, 0, 6, micro=2, world=world, workers=workers) == expected, (world, workers)
    # Elastic: two steps on four ranks, then on one, then on two, each opened anew where the other stopped.
    assert (
        steps_of(corpus, 0, 2, 1, 4, 0) + steps_of(corpus, 2, 1, 4, 1, 0) + steps_of(corpus, 3, 3, 2, 2, 2) == expected
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_pinned_batches_are_the_same(data_config: DataConfig, workers: int) -> None:
    """What the trainer asks for on CUDA; without a GPU nothing is pinned, but batches take the same way."""
    corpus = opened(data_config, phases=PHASES)
    plain = loader_of(corpus, workers=0).batches(1)
    pinned = loader_of(corpus, workers=workers, pin_memory=True).batches(1)
    for _ in range(3):
        for expected, found in zip(next(plain), next(pinned), strict=True):
            assert all(a.equal(b) and a.dtype == b.dtype for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("prefetch_steps", [1, 3])
@pytest.mark.parametrize("workers", [0, 1, 5])
def test_nothing_is_asked_for_further_ahead_than_allowed(
    data_config: DataConfig, workers: int, prefetch_steps: int
) -> None:
    corpus = opened(data_config)
    furthest, original = 0, corpus.plan.locate

    def watched(samples_S):  # type: ignore[no-untyped-def]
        nonlocal furthest
        furthest = max(furthest, int(samples_S.max()))
        return original(samples_S)

    corpus.plan.locate = watched  # type: ignore[method-assign]
    batches = loader_of(corpus, workers=workers, prefetch_steps=prefetch_steps).batches(0)
    for step in range(3):
        next(batches)
        ahead = prefetch_steps if workers else 0
        assert furthest < (step + 1 + ahead) * BATCH, "a change after the step before acts on all later steps"


def test_the_stream_ends_where_the_caps_say(data_config: DataConfig) -> None:
    corpus = opened(data_config, weights={"table": 1.0}, max_epochs={"table": 20 / 1598})
    assert corpus.plan.end == 20
    for workers in (0, 2):
        steps = list(loader_of(corpus, workers=workers).batches(0))
        assert [sorted(collected(step)) for step in steps] == [list(range(8)), list(range(8, 16))]


def children() -> list[psutil.Process]:
    return psutil.Process().children()


@pytest.mark.parametrize("victims", [1, 2])
def test_killed_workers_are_replaced_and_the_data_is_the_same(
    data_config: DataConfig, caplog: pytest.LogCaptureFixture, victims: int
) -> None:
    corpus = opened(data_config, phases=PHASES)
    expected = steps_of(corpus, 0, 8, 2, 1, 0)
    others, handler = set(children()), signal.getsignal(signal.SIGCHLD)
    batches = loader_of(corpus, workers=2).batches(0)
    found = [collected(next(batches)) for _ in range(2)]
    workers = [each for each in children() if each not in others]
    assert len(workers) == 2
    assert signal.getsignal(signal.SIGCHLD) == handler
    with caplog.at_level(logging.WARNING, "evenkeel"):
        logging.getLogger("evenkeel").propagate = True
        for worker in workers[:victims]:
            os.kill(worker.pid, signal.SIGKILL)
        time.sleep(0.2)  # torch's own way: an exception out of whatever the trainer does here
        found += [collected(next(batches)) for _ in range(6)]
    assert found == expected
    assert "workers are started again, with the same data" in caplog.text
    assert not {each.pid for each in children()} & {each.pid for each in workers}, "the old ones are gone"


def test_workers_that_die_at_once_do_not_end_the_run(
    data_config: DataConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = opened(data_config)
    expected = steps_of(corpus, 0, 3, 2, 1, 0)
    trainer, original = os.getpid(), TokenCorpus.train_batch

    def deadly(self, samples_S, located=None):  # type: ignore[no-untyped-def]
        if os.getpid() != trainer:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, samples_S, located)

    monkeypatch.setattr(TokenCorpus, "train_batch", deadly)
    with caplog.at_level(logging.WARNING, "evenkeel"):
        logging.getLogger("evenkeel").propagate = True
        batches = loader_of(corpus, workers=2).batches(0)
        found = [collected(next(batches)) for _ in range(3)]
    assert found == expected
    assert caplog.text.count("started again") == 2
    assert "reading in the training process" in caplog.text


def test_what_goes_wrong_in_reading_is_no_dead_worker(data_config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self, samples_S, located=None):  # type: ignore[no-untyped-def]
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: this is only a text")

    monkeypatch.setattr(TokenCorpus, "train_batch", broken)
    with pytest.raises(RuntimeError, match="only a text"):
        next(loader_of(opened(data_config), workers=1).batches(0))


def test_a_phase_that_no_sample_reaches_is_kept_out(data_config: DataConfig, tmp_path: Path) -> None:
    corpus = opened(data_config, phases=PHASES)
    assert [phase.start for phase in corpus.plan.phases(20)] == [0, 13]
    assert [phase.start for phase in corpus.plan.phases(33)] == [0, 13, 32]
    assert corpus.domain_shares == corpus.plan.phase(0).shares_D
