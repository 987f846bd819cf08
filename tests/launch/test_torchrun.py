"""The exit code of a job is the one of the rank that had the cause, however the ranks go down; most codes are final."""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.faults.faultkit import Job, checkpoints, lost_steps
from tests.harness import ROOT, environment, tiny_config
from tests.launch.test_cluster import free_port
from trainer.data.config import DataConfig

RANKS = """
import os, sys, time
from pathlib import Path
from launch._cli import run_command
from trainer.errors import PeerLostError, StorageError

def main(argv):
    if os.environ["RANK"] == "0":
        raise StorageError("no space left")
    while not (Path(os.environ["EVENKEEL_EXIT_CODES"]) / "0").exists():
        time.sleep(0.05)
    raise PeerLostError("another rank is gone")

code = run_command(main)
if os.environ["RANK"] == "0":
    time.sleep(30)  # libraries that take their time at exit: the agent loses its patience first
sys.exit(code)
"""


def test_a_rank_that_is_ended_on_its_way_out_has_said_its_code(tmp_path: Path) -> None:
    done = start(tmp_path, RANKS, "--standalone", "--nproc-per-node=2", "--max-restarts=3").wait(100)
    assert done == 6, "and nothing was restarted, though the first to go had only lost its peer"


def start(folder: Path, ranks: str, *options: str) -> subprocess.Popen[bytes]:
    """Ranks that run a few lines of Python, under our torchrun."""
    (folder / "few_lines.py").write_text(ranks)
    line = [sys.executable, "-m", "launch.torchrun", *options, "-m", "few_lines"]
    return subprocess.Popen(line, cwd=folder, env=environment(PYTHONPATH=f"{folder}:{ROOT}"))


ENDS = """
import os, signal, sys
from pathlib import Path
number = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
Path(f"start-{number}").touch()
if number == 0:
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit([None, 1, 5, 3, 0][number])
"""


@pytest.mark.fault(31, "restarts until a final exit code")
def test_crashes_and_lost_peers_are_restarted_until_a_code_is_final(tmp_path: Path) -> None:
    assert start(tmp_path, ENDS, "--standalone", "--nproc-per-node=1", "--max-restarts=9").wait(100) == 3
    assert len(list(tmp_path.glob("start-*"))) == 4


ONE_OF_TWO_NODES = """
import os, sys, time
from pathlib import Path
node = sys.argv[1]
Path(f"start-{node}-{os.environ['TORCHELASTIC_RESTART_COUNT']}").touch()
while len(list(Path.cwd().glob("start-*"))) < 2:
    time.sleep(0.05)
if node == "struck":
    sys.exit(2)
if node == "loses its peer":
    sys.exit(5)
time.sleep(200)
"""


@pytest.mark.parametrize("nodes", [("struck", "waits"), ("loses its peer", "struck")])
def test_a_final_code_of_one_node_ends_the_others_with_it(nodes: Sequence[str], tmp_path: Path) -> None:
    (tmp_path / "few_lines.py").write_text(ONE_OF_TWO_NODES)
    port, began = free_port(), time.monotonic()
    agents = [
        subprocess.Popen(
            [
                sys.executable, "-m", "launch.torchrun", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3",
                "--rdzv-backend=c10d", "--rdzv-id=a", f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1",
                f"--rdzv-conf=is_host={str(node == nodes[0]).lower()}", "-m", "few_lines", node,
            ],
            cwd=tmp_path, env=environment(PYTHONPATH=f"{tmp_path}:{ROOT}"),
        )
        for node in nodes
    ]  # fmt: skip
    assert [agent.wait(100) for agent in agents] == [2, 2]
    assert time.monotonic() - began < 90, "neither the waiting rank nor a rendezvous was waited for"
    assert len(list(tmp_path.glob("start-*"))) == 2, "nothing was restarted"


def test_a_mistake_in_the_configuration_is_told_once(tmp_path: Path, data_config: DataConfig) -> None:
    job = Job(
        tiny_config(tmp_path, data_config), tmp_path / "run", "train.stepz=3", ranks=1, torchrun="--max-restarts 3"
    )
    assert job.end() == 2
    assert len(job.errors) == 1, job.log


@pytest.mark.fault(18, "SIGTERM to a rank, restarts left")
def test_a_rank_that_was_asked_to_stop_is_not_restarted(tmp_path: Path, data_config: DataConfig) -> None:
    config = tiny_config(tmp_path, data_config)
    job = Job(config, tmp_path / "run", ranks=1, fault="terminate@0:6:forward", torchrun="--max-restarts 3")
    assert job.end() == 75, job.log[-3000:]
    assert "resumed" not in job.log
    assert lost_steps(tmp_path / "run") == 0
    assert checkpoints(tmp_path / "run")[-1] in (6, 7), "the step in which it was asked to, or the one after"


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
