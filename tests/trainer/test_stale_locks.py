"""A lock of a build that nobody finishes is removed; one that is in use is waited for."""

import os
import threading
import time
from pathlib import Path

import pytest

from trainer.stale_locks import wait_for_extension_lock


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = tmp_path / "deepspeed_shm_comm" / "lock"
    path.parent.mkdir()
    return path


def test_without_a_lock_nobody_waits(lock: Path) -> None:
    wait_for_extension_lock()


def test_a_lock_left_behind_is_removed(lock: Path) -> None:
    lock.touch()
    os.utime(lock, (time.time() - 400, time.time() - 400))
    wait_for_extension_lock()
    assert not lock.exists()


@pytest.mark.timeout(30)
def test_a_lock_from_before_the_clock_was_set_back_is_removed(lock: Path) -> None:
    lock.touch()
    os.utime(lock, (time.time() + 86400, time.time() + 86400))
    start = time.monotonic()
    wait_for_extension_lock(patience_s=0.5)
    assert 0.4 < time.monotonic() - start < 20
    assert not lock.exists()


def test_a_lock_in_use_is_waited_for(lock: Path) -> None:
    lock.touch()
    released = threading.Timer(0.5, lock.unlink)
    released.start()
    start = time.monotonic()
    wait_for_extension_lock()
    assert time.monotonic() - start > 0.3
    released.join()
