"""Token files are read by megatron-core, and a rank does not import the whole of it for that."""

import subprocess
import sys

import pytest

from tests.harness import ROOT

HEAVY = ("torch._inductor", "wandb")
ALONE = f"""
import sys
import trainer.data.indexed
assert trainer.data.indexed._IndexReader.__module__ == "megatron.core.datasets.indexed_dataset"
left = [name for name in sys.modules if name.startswith(("megatron", *{HEAVY}))]
assert not left, left
from megatron.core import parallel_state  # the real package is there for whoever asks for it
assert len([name for name in sys.modules if name.startswith("megatron.core.")]) > 50
"""
OTHER_VERSION = """
import importlib, sys
original = importlib.import_module
def lacks(name, package=None):
    if name == "megatron.core._rank_utils":
        raise ImportError(name)
    return original(name, package)
importlib.import_module = lacks
import trainer.data.indexed
from megatron.core.datasets.indexed_dataset import _IndexReader
assert trainer.data.indexed._IndexReader is _IndexReader
"""


@pytest.mark.parametrize("program", [ALONE, OTHER_VERSION], ids=["alone", "other version"])
def test_the_reader_comes_without_the_library_around_it(program: str) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
