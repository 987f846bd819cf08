"""On CUDA a step waits for the device at the declared places only, and its data travels meanwhile."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import pytest
import torch

from moe.bias_hook import ExpertBiasConfig, ExpertBiasHook
from reweighting.hook import FrozenConfig, SampleReweightConfig, SampleReweightHook
from tests.bench.collectives import LocalEngine
from tests.bench.gpu.step import MODEL, full_shape
from tests.bench.group import join_process_group
from tests.bench.steps import OurStep, StepShape
from tests.gpu.host_syncs import HostSyncs
from trainer.data.config import DataConfig
from trainer.data.corpus import TokenCorpus
from trainer.data.loader import TrainLoader
from trainer.hooks import Hook

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
SMALL = replace(
    MODEL, hidden_size=64, num_layers=2, dense_intermediate_size=64, num_heads=4, num_kv_heads=4, head_dim=16,
    num_experts=8, top_k=2, expert_intermediate_size=32,
)  # fmt: skip


def small_shape(**changes: object) -> StepShape:
    return replace(full_shape(CUDA), model=replace(SMALL, **changes), vocab_size=128, sequence=128)  # type: ignore[arg-type]


def both_hooks() -> dict[str, Hook]:
    weights = SampleReweightConfig(record_every=0, frozen=FrozenConfig(tolerance=1e9))
    return {"expert_bias": ExpertBiasHook(ExpertBiasConfig()), "sample_reweight": SampleReweightHook(weights)}


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", ["deferred", "two_pass", "frozen"])
def test_forwards_backwards_and_hooks_wait_at_declared_places_only(
    mode: Literal["deferred", "two_pass", "frozen"], masked: bool
) -> None:
    """Everything of a step but DeepSpeed, whose own waits the next test counts."""
    shape = small_shape(document_mask=masked)
    step = OurStep(LocalEngine(shape.build()), shape, both_hooks(), mode)  # type: ignore[arg-type]
    for _ in range(2):  # first calls may initialise libraries, and the first step of a frozen run is exact
        step.after(step.accumulate())
    with waiting_is_an_error():
        step.after(step.accumulate())
    with HostSyncs() as syncs:
        step.after(step.accumulate())
    # The verdict on the losses, and the audit of a frozen step: declared, but counted.
    assert syncs.count == (2 if mode == "frozen" else 1)
    if mode == "frozen":
        assert step.records.values["reweight/frozen"] == 1


def test_deepspeed_waits_no_more_with_our_hooks_than_without() -> None:
    join_process_group()
    shape = small_shape()
    engine = OurStep.start_engine(shape.build(), shape)
    counts = []
    for step in (OurStep(engine, shape, {}), OurStep(engine, shape, both_hooks(), "frozen")):
        for _ in range(2):
            step()
        with HostSyncs() as syncs:
            step()
        counts.append(syncs.count)
    plain, hooked = counts
    assert hooked == plain + 1, "the audit of a frozen step"


def test_batches_come_from_pinned_memory_and_travel_while_the_device_works(data_config: DataConfig) -> None:
    corpus = TokenCorpus.open(
        data_config, sequence_length=32, seed=5, mask_documents=False, steps=8, global_batch_size=8
    )
    for workers in (0, 2):
        loader = TrainLoader(
            corpus, global_batch_size=8, micro_batch_size=4, rank=0, world_size=1, num_workers=workers, pin_memory=True
        )
        batches = loader.batches(0)
        first = next(batches)
        assert all(tensor.is_pinned() for batch in first for tensor in batch)
        matrix = torch.randn(8192, 8192, device=CUDA)
        torch.cuda.synchronize()
        done = torch.cuda.Event()
        began = time.perf_counter()
        with waiting_is_an_error():
            for _ in range(20):
                matrix = matrix @ matrix * 1e-3
            moved = [batch.to(CUDA) for batch in first]
            done.record()
            enqueued = time.perf_counter() - began
            assert not done.query(), "the host has gone on while the device still works"
        done.synchronize()
        assert enqueued < 0.5 * (time.perf_counter() - began)
        for batch, there in zip(first, moved, strict=True):
            assert all(torch.equal(a, b.cpu()) for a, b in zip(batch, there, strict=True))
        batches.close()
