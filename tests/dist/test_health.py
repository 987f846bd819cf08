"""Two real ranks look at each other before training: the one that differs is named, and both end alike."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness import ROOT, environment, run, tiny_config
from trainer.data.config import DataConfig

HOST = socket.gethostname()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, by case."""
    folder = tmp_path_factory.mktemp("health")
    done = run("tests.dist.health_worker", str(folder), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def test_ranks_that_are_alike_are_fit(found: list[dict[str, Any]]) -> None:
    record = found[0]["fit"]["record"]
    assert (record["ranks"], record["hosts"]) == (2, [HOST])
    assert record["all_reduce_gb_s"] > 0.005
    assert record["all_to_all_gb_s"] > 0.005
    assert record["clock_skew_s"] < 2
    assert record["seconds"] < 5, "cheap: well under a second where nobody else computes"
    line = found[0]["fit"]["line"]
    assert line.startswith("health: 2 ranks on 1 host (")
    assert "all-to-all" in line


@pytest.mark.parametrize(
    ("case", "code", "message"),
    [
        ("not shared", 6, "health: rank 0 ({0}) does not see in {folder}"),
        ("not writable", 6, "health: rank 1 ({0}) cannot write to"),
        ("no room", 6, "GiB free, a checkpoint of this run takes about 931322.57"),
        ("strict", 5, "health: rank 1 ({0}) is slow: a matrix product takes"),
    ],
)
def test_what_would_end_badly_is_refused_on_every_rank(
    case: str, code: int, message: str, found: list[dict[str, Any]]
) -> None:
    for rank in found:
        assert rank[case]["code"] == code
        assert rank[case]["everywhere"], "one rank says it"
        assert "\n" not in rank[case]["error"]
        assert message.partition("{folder}")[0].format(HOST) in rank[case]["error"]


def test_other_code_is_refused_with_both_digests(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["code"]["code"] == 2
        assert rank["code"]["error"].startswith("health: code is ")
        assert f"on rank 1 ({HOST}) but" in rank["code"]["error"]


def test_every_setting_that_differs_is_named(found: list[dict[str, Any]]) -> None:
    for rank in found:
        lines = rank["settings"]["error"].splitlines()
        assert rank["settings"]["code"] == 2
        assert len(lines) == 2
        assert lines[0].startswith(f"health: new.key is true on rank 1 ({HOST}) but null on rank 0")
        assert lines[1].startswith(f"health: train.steps is 13 on rank 1 ({HOST}) but 12 on rank 0 ({HOST})")


@pytest.mark.parametrize(
    ("case", "beginning"),
    [
        ("slow", "health: rank 1 ({}) is slow"),
        ("clock", "health: the clock of rank 1 ({}) is +60.0 s off"),
        ("bandwidth", "health: all-reduce runs at"),
        ("little room", "health: /"),
    ],
)
def test_what_only_costs_time_is_a_warning(case: str, beginning: str, found: list[dict[str, Any]]) -> None:
    assert found[0][case]["warnings"][0].startswith(beginning.format(HOST)), found[0][case]
    if case == "slow":
        assert found[0][case]["record"]["slowest_rank"] == 1


def test_no_mark_is_left(found: list[dict[str, Any]]) -> None:
    assert found[1]["left"] == []


@pytest.mark.slow
def test_the_command_ends_with_the_exit_code_of_what_it_found(tmp_path: Path, data_config: DataConfig) -> None:
    config = tiny_config(tmp_path, data_config)
    fit = run("launch.health", str(config), ranks=2)
    assert fit.returncode == 0, fit.stderr[-2000:]
    assert "health: 2 ranks on 1 host" in fit.stdout
    assert not (tmp_path / "run").exists(), "a look leaves nothing"
    for module in ("launch.health", "launch.train"):
        unlike = f'if [ "$RANK" = 1 ]; then set -- "$@" train.steps=13; fi; exec "$0" -m {module} "$@"'
        torchrun = [sys.executable, "-m", "launch.torchrun", "--standalone", "--nproc_per_node=2", "--no-python"]
        done = subprocess.run(
            [*torchrun, "bash", "-c", unlike, sys.executable, str(config)],
            cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr[-3000:]
        errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
        assert len(errors) == 1, "one rank says it"
        assert "health: train.steps is 13 on rank 1" in errors[0]


@pytest.mark.slow
@pytest.mark.fault(32, "a rank frozen before the first collective")
def test_a_rank_that_does_not_answer_is_named(tmp_path: Path, data_config: DataConfig) -> None:
    config = tiny_config(tmp_path, data_config, engine={"collective_timeout_s": 8.0})
    done = run("tests.dist.frozen_worker", str(config), ranks=2)
    assert done.returncode == 5, done.stderr[-3000:]
    assert "process group: rank 1 of 2 joined but does not answer within 8 s" in done.stderr
