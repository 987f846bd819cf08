"""The exit code of a job is the one of the rank that had the cause, however the ranks go down."""

from pathlib import Path

from tests.harness import run

RANKS = """
import os, sys, time
from pathlib import Path
from launch._cli import run_command
from trainer.errors import PeerLostError, StorageError

def main(argv):
    if os.environ["RANK"] == "0":
        raise StorageError("no space left")
    while not list(Path(os.environ["EVENKEEL_EXIT_CODES"]).glob("*-0")):
        time.sleep(0.05)
    raise PeerLostError("another rank is gone")

code = run_command(main)
if os.environ["RANK"] == "0":
    time.sleep(30)  # libraries that take their time at exit: the agent loses its patience first
sys.exit(code)
"""


def test_a_rank_that_is_ended_on_its_way_out_has_said_its_code(tmp_path: Path) -> None:
    (tmp_path / "dying_ranks.py").write_text(RANKS)
    assert run("dying_ranks", ranks=2, cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{Path.cwd()}").returncode == 6
