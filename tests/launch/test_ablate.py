"""Grids run for real: killed, interrupted, failing and halved, in real processes with real run folders."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from psutil import Process

from configs.grid import HalvingConfig
from launch import ablate
from launch._cli import run_command
from launch._folder_lock import folder_holder, lock_folder
from launch._grid_halving import decide
from launch._grid_slots import make_slots
from tests.harness import ROOT, command, environment, losses, rows, run, tiny_config
from trainer.data.config import DataConfig
from trainer.data.prepare import read_manifest
from trainer.errors import ConfigError

Begin = Callable[..., "subprocess.Popen[str]"]


def write_grid(tmp_path: Path, data: DataConfig, **fields: Any) -> Path:
    base = tiny_config(tmp_path / "base", data)
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({"config": str(base), "folder": str(tmp_path / "grid"), **fields}, sort_keys=False))
    return path


@pytest.fixture
def begin() -> Iterator[Begin]:
    """Starts ablate; what a failed test leaves running is ended."""
    started: list[subprocess.Popen[str]] = []

    def start(grid: Path, *arguments: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            command("launch.ablate", str(grid), *arguments),
            cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def wait_until(condition: Callable[[], bool], timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


def steps_of(folder: Path) -> int:
    """Training steps a run has written."""
    try:
        return sum('"loss"' in line for line in (folder / "metrics.jsonl").read_text().splitlines())
    except FileNotFoundError:
        return 0


def states(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return found


def attempts(folder: Path, name: str) -> int:
    """How often a run was started, from outside and while the state may not be there yet."""
    return int(states(folder)[name]["attempts"]) if (folder / "state.json").exists() else 0


def disjoint(sets: list[set[int]]) -> bool:
    """Whether two sets share nothing."""
    return len(sets) == 2 and sets[0].isdisjoint(sets[1])


STEPS = 30
SLOW = {"hooks.slow.hook": "tests.launch.grid_hooks:Slow", "hooks.slow.seconds": 0.2}


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two runs at a time need a core each")
@pytest.mark.timeout(600)
def test_a_grid_survives_sigterm_kill_9_and_failing_runs(
    tmp_path: Path, data_config: DataConfig, begin: Begin, capsys: pytest.CaptureFixture[str]
) -> None:
    dies = {"hook": "tests.launch.grid_hooks:DiesOnce", "marker": str(tmp_path / "marker"), "step": 3}
    path = write_grid(
        tmp_path, data_config,
        overrides={**SLOW, "train.steps": STEPS, "data.path": str(tmp_path / "corpus")},
        variants={
            "plain": {},
            "dying": {"hooks.dies": dies},
            "refusing": {"hooks.refuses.hook": "tests.launch.grid_hooks:Refuses"},
        },
        baseline="plain", seeds=[4],
    )  # fmt: skip
    grid = tmp_path / "grid"
    plain, dying = grid / "plain_s4", grid / "dying_s4"

    # SIGTERM: what runs saves, and waits. One of the two has been killed and started again by then.
    first = begin(path, "--parallel", "2")
    wait_until(lambda: attempts(grid, "dying_s4") == 1)
    wait_until(lambda: disjoint([os.sched_getaffinity(each.pid) for each in Process(first.pid).children()]))
    wait_until(lambda: attempts(grid, "dying_s4") == 2 and steps_of(plain) >= 1)
    first.send_signal(signal.SIGTERM)
    output = first.communicate(timeout=120)[0]
    assert first.returncode == 75, output
    assert "dying_s4: ended with signal SIGKILL and is tried again" in output
    assert read_manifest(tmp_path / "corpus") is not None, "text that was not there has been prepared"
    found = states(grid)
    assert [found[name]["status"] for name in ("plain_s4", "dying_s4", "refusing_s4")] == ["waiting"] * 3, output
    saved = max(int(folder.name[5:]) for folder in (plain / "checkpoints").glob("step-*"))
    assert 0 < saved < STEPS
    assert not folder_holder(plain)

    # kill -9: the runs are told by the system, save too, and are gone.
    second = begin(path, "--parallel", "1")
    wait_until(lambda: steps_of(plain) > saved and bool(folder_holder(plain)))
    second.kill()
    second.communicate()
    wait_until(lambda: not folder_holder(plain))
    assert max(int(folder.name[5:]) for folder in (plain / "checkpoints").glob("step-*")) > saved
    assert states(grid)["plain_s4"]["status"] == "running", "nobody was there to write otherwise"

    # Run again: it continues, the one that cannot start is reported and keeps nobody from the rest.
    third = begin(path, "--parallel", "2")
    output = third.communicate(timeout=200)[0]
    assert third.returncode == 1, output
    found = states(grid)
    assert [found[name]["status"] for name in ("plain_s4", "dying_s4", "refusing_s4")] == ["done", "done", "failed"]
    assert (found["refusing_s4"]["exit_code"], found["refusing_s4"]["attempts"]) == (2, 1), "not tried twice"
    assert found["refusing_s4"]["reason"] == "error: hooks.refuses: always refuses"
    assert "failed: refusing_s4 (exit code 2)" in output
    assert len(losses(plain)) == STEPS
    assert losses(plain) == losses(dying), "one seed, one course, whatever came between"

    contract = json.loads((grid / "grid.json").read_text())
    assert (contract["format"], contract["baseline"]) == (1, "plain")
    assert contract["runs"][1] == {
        "folder": "dying_s4", "variant": "dying", "seed": 4,
        "settings": {"hooks.dies.hook": dies["hook"], "hooks.dies.marker": dies["marker"], "hooks.dies.step": 3},
    }  # fmt: skip

    # What is done stays done; other settings are refused, and a folder that was deleted would be run anew.
    started = states(grid)["plain_s4"]["attempts"]
    tree = yaml.safe_load(path.read_text())
    del tree["variants"]["refusing"]
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    assert run_command(ablate.main, [str(path)]) == 0
    assert states(grid)["plain_s4"]["attempts"] == started
    tree["overrides"]["optimizer.learning_rate"] = 1.0e-3
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    assert run_command(ablate.main, [str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "plain_s4: has begun with other settings (optimizer.learning_rate: 0.003 -> 0.001)" in lines[0]


@pytest.mark.slow
def test_ranks_of_a_run_do_not_outlive_ablate(tmp_path: Path, data_config: DataConfig, begin: Begin) -> None:
    path = write_grid(tmp_path, data_config, overrides={**SLOW, "train.steps": 24}, variants={"two": {}}, ranks=2)
    folder = tmp_path / "grid" / "two_s3"
    first = begin(path)
    wait_until(lambda: steps_of(folder) >= 3)
    agent = Process(first.pid).children()[0]
    workers = agent.children()
    assert len(workers) == 2
    first.kill()
    first.communicate()
    wait_until(lambda: not any(each.is_running() for each in [agent, *workers]), timeout=60)
    saved = max(int(each.name[5:]) for each in (folder / "checkpoints").glob("step-*"))
    assert saved >= 3
    done = run("launch.ablate", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resumed from step {saved}" in (folder / "output.txt").read_text()
    assert len(losses(folder)) == 24


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_hopeless_variants_are_stopped_at_a_rung_with_all_their_seeds(tmp_path: Path, data_config: DataConfig) -> None:
    path = write_grid(
        tmp_path, data_config,
        overrides={**SLOW, "train.steps": 24, "evaluation.every": 6},
        product=[{"key": "optimizer.learning_rate", "name": "lr", "values": [3.0e-3, 1.0e-6, 1.0e-7, 1.0e-2]}],
        baseline="lr-1e-06", seeds=[1, 2], halving={"rungs": [6, 12], "keep": 0.3},
    )  # fmt: skip
    done = run("launch.ablate", str(path), timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    grid = tmp_path / "grid"
    first, second = json.loads((grid / "halving.json").read_text())
    assert (first["rung"], first["seeds"], first["stopped"]) == (6, [1, 2], ["lr-1e-07"])
    assert second["rung"] == 12
    assert len(second["stopped"]) == 1
    assert second["stopped"][0] in ("lr-0.003", "lr-0.01")
    for name, state in states(grid).items():
        is_stopped = name.rsplit("_s", 1)[0] in first["stopped"] + second["stopped"]
        assert state["status"] == ("stopped" if is_stopped else "done")
        assert (steps_of(grid / name) < 24) == is_stopped
        assert state["reason"].startswith("halving at step" if is_stopped else "")
    values = {r["step"]: r["eval/loss"] for r in rows(grid / "lr-0.003_s1") if "eval/loss" in r}
    other = {r["step"]: r["eval/loss"] for r in rows(grid / "lr-0.003_s2") if "eval/loss" in r}
    assert first["means"]["lr-0.003"] == pytest.approx((values[6] + other[6]) / 2)  # type: ignore[operator]
    assert run_command(ablate.main, [str(path)]) == 0
    assert json.loads((grid / "halving.json").read_text()) == [first, second], "decisions are made once"


@given(
    st.dictionaries(
        st.text("abcdefgh", min_size=1, max_size=2),
        st.dictionaries(st.integers(1, 4), st.floats(allow_nan=False)),
        min_size=1, max_size=9,
    ),
    st.floats(0.01, 0.99), st.data(),
)  # fmt: skip
@settings(max_examples=300)
def test_halving_keeps_the_best_share_on_common_seeds_and_the_baseline(
    values: dict[str, dict[int, float]], keep: float, data: st.DataObject
) -> None:
    baseline = data.draw(st.sampled_from(["", *values]))
    decision = decide(HalvingConfig(rungs=[5], keep=keep), 5, values, baseline)
    present = [set(by_seed) for by_seed in values.values() if by_seed]  # the others' runs have all failed
    common = set.intersection(*present) if present else set()
    assert set(decision.seeds) == common
    assert sorted(decision.kept + decision.stopped) == sorted(values)
    assert not baseline or baseline in decision.kept
    if not common:
        assert not decision.stopped
        return
    least = math.ceil(keep * len(values))
    assert least <= len(decision.kept) <= least + bool(baseline)
    assert all(decision.means[name] is None for name, by_seed in values.items() if not by_seed)
    means = {name: math.inf if mean is None else mean for name, mean in decision.means.items()}
    worst_kept = max(means[name] for name in decision.kept if name != baseline or len(decision.kept) == least)
    assert all(means[name] >= worst_kept for name in decision.stopped)


def test_slots_share_no_core_and_no_gpu() -> None:
    for count, ranks, cores in [(1, 1, 2), (2, 1, 2), (3, 2, 7), (4, 2, 4), (1, 4, 2)]:
        slots = make_slots(count, ranks=ranks, num_runs=9, cpus=range(cores), gpus=[])
        used = [cpu for slot in slots for cpu in slot.cpus]
        assert sorted(used) == list(range(cores))
        assert all(slot.threads == max(1, len(slot.cpus) // ranks) for slot in slots)
    assert len(make_slots(0, ranks=2, num_runs=9, cpus=range(8), gpus=[])) == 4
    assert len(make_slots(0, ranks=1, num_runs=3, cpus=range(8), gpus=[])) == 3
    slots = make_slots(0, ranks=2, num_runs=9, cpus=range(8), gpus=["0", "3", "5", "6", "7"])
    assert [slot.gpus for slot in slots] == [("0", "3"), ("5", "6")]
    with pytest.raises(ConfigError, match="3 runs with 1 of their own need 3 cores, there are 2"):
        make_slots(3, ranks=1, num_runs=9, cpus=range(2), gpus=[])
    with pytest.raises(ConfigError, match="need 4 GPUs, there are 3"):
        make_slots(2, ranks=2, num_runs=9, cpus=range(8), gpus=["0", "1", "2"])
    with pytest.raises(ConfigError, match="4 ranks a run need as many GPUs, 1 are visible"):
        make_slots(0, ranks=4, num_runs=9, cpus=range(8), gpus=["0"])


def test_dry_run_starts_nothing_and_adds_up(
    tmp_path: Path, data_config: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_grid(tmp_path, data_config, variants={"a": {}, "b": {"train.steps": 24}}, seeds=[1, 2])
    assert run_command(ablate.main, [str(path), "--dry-run", "--seconds-per-step", "10", "--parallel", "2"]) == 0
    lines = [[cell.strip() for cell in line.split("│")] for line in capsys.readouterr().out.splitlines() if "│" in line]
    by_name = {line[1]: line for line in lines}
    assert list(by_name) == ["a_s1", "b_s1", "a_s2", "b_s2", "all"]
    assert [by_name[name][-2] for name in by_name] == ["120 s", "240 s", "120 s", "240 s", "360 s"]
    assert (by_name["a_s1"][5], by_name["all"][5]) == ("3.07 k", "18.4 k"), "8 rows of 32 tokens a step"
    assert not (tmp_path / "grid").exists()
    assert run_command(ablate.main, [str(path), "--dry-run"]) == 0
    assert "Time is not known" in capsys.readouterr().out


def test_wrong_use_is_one_line(tmp_path: Path, data_config: DataConfig, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_grid(tmp_path, data_config, variants={"a": {}})
    for arguments, says in [
        (["--parallel", "-1"], "--parallel: -1 is negative"),
        (["--parallel", "999"], "there are"),
        (["--seconds-per-step", "1"], "--seconds-per-step: needs --dry-run"),
        (["model.top_k=99"], "top_k: 99 must be between"),
    ]:
        assert run_command(ablate.main, [str(path), *arguments]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert says in lines[0]
    assert run_command(ablate.main, [str(tmp_path / "none.yaml")]) == 2
    assert "no such grid file; presets in configs/grids/: ablation-demo" in capsys.readouterr().err


def test_a_grid_in_use_or_damaged_is_exit_3(
    tmp_path: Path, data_config: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_grid(tmp_path, data_config, variants={"a": {}})
    grid = tmp_path / "grid"
    grid.mkdir()
    lock = lock_folder(grid)
    assert not isinstance(lock, str)
    assert run_command(ablate.main, [str(path)]) == 3
    assert f"is in use by process {os.getpid()} on" in capsys.readouterr().err
    lock.close()
    (grid / "state.json").write_text('{"a_s3": {"status": "sleeping"}}')
    assert run_command(ablate.main, [str(path)]) == 3
    assert "a_s3 has status 'sleeping'" in capsys.readouterr().err
    (grid / "metrics.jsonl").touch()
    assert run_command(ablate.main, [str(path)]) == 2
    assert "is the folder of a run" in capsys.readouterr().err


def test_slurm_array_runs_each_folder_whatever_its_name(
    tmp_path: Path, data_config: DataConfig, on_path: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script is executed, with stand-ins for Slurm's own commands and for the agents."""
    folder = tmp_path / 'it\'s a "grid" $HOME'
    path = write_grid(
        tmp_path, data_config, variants={"a": {}, "b": {"train.steps": 8}}, ranks=2, folder=str(folder),
        slurm={"partition": "gpu", "time": "1:00:00", "nodes": 2},
    )  # fmt: skip
    agent = tmp_path / "an interpreter" / "python"
    agent.parent.mkdir()
    agent.write_text('#!/bin/bash\nprintf "%s\\n" "$@" > "$STAND_IN/$SLURM_ARRAY_TASK_ID-$SLURM_NODEID"\nexit 5\n')
    agent.chmod(0o755)
    script = tmp_path / "array.sh"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(agent))
        assert run_command(ablate.main, [str(path), "--slurm", str(script), "--parallel", "1"]) == 0
    text = script.read_text()
    assert "#SBATCH --array=0-1%1" in text
    assert "#SBATCH --partition=gpu" in text
    for task, name in enumerate(["a_s3", "b_s3"]):
        env = environment(**on_path, SLURM_ARRAY_TASK_ID=str(task))
        done = subprocess.run(["bash", str(script)], env=env, cwd="/", capture_output=True, text=True, check=False)
        assert done.returncode == 5, done.stderr
        for node, is_host in ((0, "true"), (1, "false")):
            words = (tmp_path / f"{task}-{node}").read_text().splitlines()
            assert words[-2:] == ["launch.train", f"{folder / name}/config.yaml"]
            assert {"--nnodes=2", "--nproc-per-node=1", "--rdzv-endpoint=127.0.0.1:20017", "--max-restarts=1"} <= set(
                words
            )
            assert f"--rdzv-conf=is_host={is_host},join_timeout=600" in words
        assert (folder / name / "config.yaml").exists()
    assert (tmp_path / "scontrol").read_text() == "requeue 17\n" * 2, "a lost rank: each task is queued again"

    path = write_grid(tmp_path, data_config, variants={"a": {}, "b": {}}, ranks=3, slurm={"nodes": 2})
    done = run("launch.ablate", str(path), "--slurm", str(script))
    assert done.returncode == 2
    path = write_grid(tmp_path, data_config, variants={"a": {}}, ranks=2, slurm={"time": "5"})
    assert run_command(ablate.main, [str(path), "--slurm", str(script)]) == 2


def example(tmp_path: Path) -> Path:
    """The grid that launch/ABLATIONS.md prints, where its base configuration is found."""
    text = (ROOT / "launch" / "ABLATIONS.md").read_text()
    text = text[text.index("<!-- the test suite runs exactly this text -->") :]
    path = tmp_path / "tour.yaml"
    path.write_text(text[text.index("```yaml\n") + 8 : text.index("\n```\n")] + "\n")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    return path


def test_the_example_of_the_docs_is_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(ablate.main, [str(example(tmp_path)), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "6 variants, 12 runs" in shown
    assert all(name in shown for name in ("sign_r-0.4_experts-8-2_s1", "router_score-softmax_s2", "plain_s1"))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_example_of_the_docs_runs_as_printed(tmp_path: Path, data_config: DataConfig) -> None:
    data = [
        f"data.path={data_config.path}", f"data.source={data_config.source}",
        f"data.vocab_size={data_config.vocab_size}", f"data.heldout_fraction={data_config.heldout_fraction}",
    ]  # fmt: skip
    path = example(tmp_path)
    done = run("launch.ablate", str(path), *data, timeout=1400, cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    decisions = json.loads((tmp_path / "runs" / "tour" / "halving.json").read_text())
    assert [len(decision["kept"]) for decision in decisions] in ([3, 2], [3, 3], [4, 2], [4, 3])
    assert all("plain" in decision["kept"] for decision in decisions)
    status = run("launch.ablate", str(path), *data, "--status", cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert status.returncode == 0
    assert "halving at step 4" in status.stdout
