"""On CUDA phases are the device's own times, and taking them waits for nothing."""

import time

import pytest
import torch

from trainer import phases
from trainer.phases import PhaseClock

pytestmark = pytest.mark.gpu


def test_phases_measure_the_device_and_never_wait() -> None:
    device = torch.device("cuda")
    clock, matrix = PhaseClock(device), torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        began = time.perf_counter()
        clock.start()
        with clock.phase("forward"):
            for _ in range(50):
                matrix = matrix @ matrix * 1e-3
        clock.busy_s()
        marks = clock.stop()
        enqueued = time.perf_counter() - began
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    spent = time.perf_counter() - began
    row = phases.metrics(marks)
    assert row["time/forward_s"] == pytest.approx(spent, rel=0.3)
    assert row["time/forward_s"] > 2 * enqueued, "the host was long done when the device was"
