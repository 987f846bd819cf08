"""One job of two ranks for all tests that need one by default: start-up costs more than the runs."""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.harness import ROOT, run

PAGE = (ROOT / "moe" / "OTHER_LOOPS.md").read_text()


def block(name: str) -> str:
    """A program of the page, as it is printed."""
    found = re.search(rf"<!-- run by the tests: {re.escape(name)} -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


def run_job(plan: str, ranks: int) -> subprocess.CompletedProcess[str]:
    """Run a plan of tests.outside.trainer_runs to its end."""
    done = run("tests.outside.trainer_runs", plan, ranks=ranks, DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stderr[-4000:]
    return done


class TwoRanks(NamedTuple):
    """What the job left."""

    folder: Path
    """`ddp` and `zero2` have the records of Trainer runs."""
    printed: list[str]
    """What the page's bare DeepSpeed loop printed."""


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> TwoRanks:
    from tests.outside.trainer_runs import Run, job

    folder = tmp_path_factory.mktemp("two-ranks")
    (folder / "bare.py").write_text(block("bare.py"))
    runs = [Run(out=str(folder / "ddp"), micro_batch=2), Run(out=str(folder / "zero2"), micro_batch=2, zero_stage=2)]
    done = run_job(job(*runs, str(folder / "bare.py")), ranks=2)
    return TwoRanks(folder, done.stdout.splitlines())
