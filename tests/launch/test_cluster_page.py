"""Every command of launch/CLUSTER.md works as written, as far as one machine without a cluster can tell."""

import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from launch._cli import run_command
from tests.harness import ROOT, environment, rows, tiny_config
from tests.launch.test_cluster import free_port
from trainer.data.config import DataConfig

PAGE = (ROOT / "launch" / "CLUSTER.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
    if line and not line.startswith("#")
]
NOT_OURS = ("sbatch ", "kubectl ")


def ours(module: str) -> list[list[str]]:
    """Arguments of each command of the page that runs `module`."""
    found = [shlex.split(line) for line in COMMANDS]
    return [words[3:] for words in found if words[:3] == ["python", "-m", module]]


def test_the_page_has_no_other_commands() -> None:
    kinds = {"launch.dryrun": 1, "launch.torchrun": 3, "launch.cluster": 4}
    assert {module: len(ours(module)) for module in kinds} == kinds
    assert len(COMMANDS) == sum(kinds.values()) + sum(line.startswith(NOT_OURS) for line in COMMANDS)


RUNS_HERE = [("launch.dryrun", words) for words in ours("launch.dryrun")] + [
    ("launch.cluster", words) for words in ours("launch.cluster") if "--run" not in words
]


@pytest.mark.parametrize(("module", "words"), RUNS_HERE)
def test_what_one_machine_can_run_runs(
    module: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "hosts").write_text("node-1 slots=8\nnode-2 slots=8\n")
    monkeypatch.chdir(tmp_path)
    assert run_command(import_module(module).main, words) == 0, capsys.readouterr().err
    if "--out" in words:
        assert (tmp_path / words[words.index("--out") + 1]).read_text()
    else:
        assert capsys.readouterr().out


def test_the_launcher_understands_its_lines() -> None:
    from torch.distributed.run import parse_args

    for words in ours("launch.torchrun"):
        parsed = parse_args(words)
        assert parsed.nproc_per_node == "8"
        assert parsed.training_script in ("launch.train", "launch.health")
        assert not parsed.training_script_args[0].startswith("-")


MESSAGES = [
    "joined but does not answer",
    "does not see in",
    "cannot write to",
    "a checkpoint of this run takes about",
    "is slow: a matrix product takes",
    "the accelerator is",
    "s off the median",
    "over all ranks, less than",
]


@pytest.mark.parametrize("said", MESSAGES)
def test_the_page_quotes_what_the_checks_say(said: str) -> None:
    assert said in PAGE
    assert any(said in (ROOT / "trainer" / name).read_text() for name in ("health_verdicts.py", "process_group.py"))


@pytest.mark.slow
def test_two_nodes_by_hand(tmp_path: Path, data_config: DataConfig) -> None:
    config, port = tiny_config(tmp_path, data_config), free_port()
    agents = []
    for words in ours("launch.torchrun")[:2]:
        line = shlex.join(words).replace("node-1:29500", f"127.0.0.1:{port}")
        line = re.sub(r"node-[12]", "127.0.0.1", line).replace("--nproc-per-node=8", "--nproc-per-node=1")
        line = line.replace("configs/deepseekmoe-1b.yaml", shlex.quote(str(config)))
        line = line.replace("/shared/runs/a", shlex.quote(str(tmp_path / "run")))
        agents.append(
            subprocess.Popen(
                [sys.executable, "-m", "launch.torchrun", *shlex.split(line)],
                cwd=ROOT, env=environment(GLOO_SOCKET_IFNAME="lo", PATH=os.environ["PATH"]), stderr=subprocess.PIPE,
                text=True,
            )
        )  # fmt: skip
    errors = [agent.communicate(timeout=200)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], errors[0][-3000:]
    assert sum("loss" in row for row in rows(tmp_path / "run")) == 12
