"""What all tests share: a quiet single-threaded environment and one small prepared corpus."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported anywhere: small tensors on shared cores are fastest on one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"
os.environ.pop("WANDB_API_KEY", None)
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

import pytest
import torch
from hypothesis import settings

from tests.harness import write_corpus_source
from trainer.data.config import DataConfig
from trainer.data.prepare import prepare

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"
settings.register_profile("evenkeel", deadline=None, max_examples=50)
settings.load_profile("evenkeel")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def logger() -> Iterator[logging.Logger]:
    """Our logger, which commands set up for their process; after each test it is again as it was."""
    found = logging.getLogger("evenkeel")
    handlers, level, propagate = found.handlers, found.level, found.propagate
    yield found
    for handler in set(found.handlers) - set(handlers):
        handler.close()
    found.handlers, found.level, found.propagate = handlers, level, propagate


@pytest.fixture(scope="session")
def data_config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Settings of a small corpus of three domains, prepared once for the whole session."""
    folder = tmp_path_factory.mktemp("corpus")
    source = write_corpus_source(folder / "source.jsonl")
    config = DataConfig(path=str(folder / "prepared"), source=str(source), vocab_size=320, heldout_fraction=0.1)
    prepare(config)
    return config
