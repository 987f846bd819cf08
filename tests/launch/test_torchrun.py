"""The exit code of a job is the one of the rank that had the cause, however the ranks go down."""

import subprocess
import sys
from pathlib import Path

from tests.harness import ROOT, environment, run, tiny_config
from trainer.data.config import DataConfig

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


LAST_WORDS = """
import os, signal, sys
from launch.train import main
try:
    main(sys.argv[1:])
except Exception as error:
    os.kill(os.getpid(), signal.SIGTERM)  # as the agent does, once it has seen another rank die
    print(f"said: {error}")
"""


def test_a_rank_that_is_told_to_end_after_an_error_still_says_what_it_was(
    tmp_path: Path, data_config: DataConfig
) -> None:
    config = tiny_config(tmp_path, data_config, hooks={"refuses": {"hook": "tests.launch.grid_hooks:Refuses"}})
    done = subprocess.run(
        [sys.executable, "-c", LAST_WORDS, str(config)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "said: hooks.refuses: always refuses" in done.stdout, done.stderr[-2000:]
