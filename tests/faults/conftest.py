"""Runs that nothing happens to, made once: what every run with a fault in it must come to in the end."""

from pathlib import Path

import pytest

from tests.faults.faultkit import KEEP, TIMEOUT_S, Reference
from tests.harness import run, tiny_config
from trainer.data.config import DataConfig

EVERY = 2  # steps between checkpoints
STEPS = 16


def make_reference(folder: Path, data: DataConfig, *, ranks: int, **sections: object) -> Reference:
    """Train to the end under the configuration of all fault tests."""
    config = tiny_config(
        folder, data,
        **{
            "train": {"steps": STEPS, "micro_batch_size": 4},
            "engine": {"zero_stage": 1 if ranks > 1 else 0, "collective_timeout_s": TIMEOUT_S},
            "model": {"dropout": 0.1},
            "checkpoint": {"every": EVERY, "keep": KEEP},
        } | sections,
    )  # fmt: skip
    done = run("launch.train", str(config), f"run_dir={folder / 'unbroken'}", ranks=ranks)
    assert done.returncode == 0, done.stderr[-2000:]
    return Reference(config, folder / "unbroken")


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, data_config: DataConfig) -> Reference:
    """An unbroken run of two ranks."""
    return make_reference(tmp_path_factory.mktemp("two"), data_config, ranks=2)


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory: pytest.TempPathFactory, data_config: DataConfig) -> Reference:
    """An unbroken run of one process without torchrun."""
    return make_reference(tmp_path_factory.mktemp("one"), data_config, ranks=0)
