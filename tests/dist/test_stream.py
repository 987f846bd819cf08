"""What real runs were trained on, step by step: for any ranks and workers, through kills, resumes and new mixtures."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from launch import data as data_command
from launch._cli import run_command
from tests.harness import ROOT, command, deterministic, environment, rows, run_trainings, tiny_config
from trainer.data.config import DataConfig

PHASES = "data.phases=[{from_sample: 44, weights: {code: 3, prose: 1}}]"  # in the midst of step 6
CAPPED = "data.max_epochs={table: 0.002}"  # 3 rows
WORKERS = "data.num_workers=2"
ONLINE = [
    "hooks.domain_reweight={rule: doremi, target: sampling, eta: 3.0, reference_losses: {code: 4, prose: 5, table: 2}}",
    "data.sampling_delay=2",
]  # fmt: skip


def digests(run_dir: Path) -> dict[int, tuple[int, int]]:
    """Digest and phase of every step."""
    return {row["step"]: (row["data/digest"], row["data/phase"]) for row in rows(run_dir) if "loss" in row}  # type: ignore[misc]


def cut_after(run_dir: Path, copy: Path, step: int) -> Path:
    """A copy of the run as a kill a little after its checkpoint of `step` would have left it."""
    shutil.copytree(run_dir, copy)
    for later in (copy / "checkpoints").glob("step-*"):
        if int(later.name.removeprefix("step-")) > step:
            shutil.rmtree(later)
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= step + 1))
    return copy


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data_config: DataConfig) -> Path:
    """Runs of one rank, of two, and runs that go on with another number of ranks or other settings."""
    folder = tmp_path_factory.mktemp("stream")
    config = tiny_config(folder, data_config, checkpoint={"every": 4, "keep": 3}, evaluation={"every": 0, "max_rows": 1})
    plain = [PHASES, CAPPED]
    run_trainings(
        [
            (config, [*plain, f"run_dir={folder / 'one'}"]),
            (config, [*plain, WORKERS, f"run_dir={folder / 'one workers'}"]),
            (config, [*ONLINE, f"run_dir={folder / 'online'}"]),
            (config, [*ONLINE, WORKERS, f"run_dir={folder / 'online workers'}"]),
        ],
        ranks=1,
    )
    for name in ("grown", "changed", "online cut"):
        cut_after(folder / ("online" if "online" in name else "one"), folder / name, 4)
    run_trainings([(config, [*ONLINE, WORKERS, f"run_dir={folder / 'online cut'}"])], ranks=1, new_process=True)
    run_trainings(
        [
            (config, [*plain, f"run_dir={folder / 'two'}"]),
            (config, [*plain, WORKERS, "train.micro_batch_size=1", f"run_dir={folder / 'grown'}"]),
            (config, ["data.weights={prose: 1}", f"run_dir={folder / 'changed'}"]),
        ],
        ranks=2,
    )
    return folder


@pytest.mark.parametrize("other", ["one workers", "two", "grown"])
def test_steps_see_the_same_samples_for_any_ranks_and_workers(trained: Path, other: str) -> None:
    """`grown` went on from step 4 with two ranks and other micro-batches."""
    expected = digests(trained / "one")
    assert len(expected) == 12
    assert digests(trained / other) == expected
    assert {phase for _, phase in expected.values()} == {0, 1, 2}, "a cap and a phase came in between"


@pytest.mark.parametrize("other", ["online workers", "online cut"])
def test_online_weights_do_not_depend_on_workers_or_interruptions(trained: Path, other: str) -> None:
    assert deterministic(trained / other) == deterministic(trained / "online")


def test_online_weights_act_after_the_delay_and_on_the_sampling(trained: Path) -> None:
    training = [row for row in rows(trained / "online") if "loss" in row]
    assert [row["data/phase"] for row in training] == [0, 0, 0, *range(1, 10)], "asked after step 1, acts in step 4"
    alphas = [row["domain/code/alpha"] for row in training]
    assert alphas[0] == pytest.approx(1 / 3)
    state = json.loads((trained / "online" / "checkpoints" / "step-00000012" / "state.json").read_text())
    changes = state["trainer"]["plan"]["changes"]
    assert [step for step, _ in changes] == [0, *range(3, 15)], "those that are still to act are kept"
    for (_, weights), alpha in zip(changes[1:], alphas[1:], strict=False):
        assert weights[0] == pytest.approx(alpha)
    assert all(row["domain/code/weight"] is not None for row in training)


def test_other_weights_on_resume_are_a_new_logged_phase(trained: Path) -> None:
    found, before = digests(trained / "changed"), digests(trained / "one")
    assert {step: found[step] for step in range(1, 5)} == {step: before[step] for step in range(1, 5)}
    assert found[5] != before[5]
    log = (trained / "changed" / "log.txt").read_text()
    assert "step 5: data phase" in log
    assert "from sample 32: prose 100.0% (data.weights as changed for this start)" in log
    state = json.loads((trained / "changed" / "checkpoints" / "step-00000012" / "state.json").read_text())
    assert [phase["first_sample"] for phase in state["trainer"]["plan"]["phases"]][-1] == 32


@pytest.mark.parametrize("name", ["one", "grown", "changed", "online cut"])
def test_the_audit_proves_what_was_trained(trained: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(data_command.main, ["audit", str(trained / name)]) == 0
    shown = capsys.readouterr().out
    assert "12 of 12 trained steps recorded their samples" in shown
    assert "exactly as planned" in shown
    lines = (trained / name / "audit" / "rows.csv").read_text().splitlines()
    assert sum(int(line.rsplit(",", 1)[1]) for line in lines[1:]) == 96


def test_the_audit_finds_steps_that_were_trained_on_something_else(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained / "one", copy)
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    training[2]["data/digest"], training[6]["data/digest"] = training[6]["data/digest"], training[2]["data/digest"]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*training, training[8]]))
    assert run_command(data_command.main, ["audit", str(copy), "--out", str(tmp_path / "csv")]) == 3
    shown = capsys.readouterr().out
    for line in ("step 3: was trained on other samples", "step 7: was trained on other", "step 9: recorded 2 times"):
        assert line in shown
    assert "3 deviations" in shown
    state = copy / "checkpoints" / "step-00000012" / "state.json"
    state.write_text(state.read_text().replace("44", "45"))
    assert run_command(data_command.main, ["audit", str(copy)]) == 3
    assert "does not have the hash in the manifest" in caplog.text
    assert "2 deviations" in capsys.readouterr().out, "judged by the checkpoint before"


def test_a_run_whose_workers_are_killed_is_the_same_run(trained: Path, data_config: DataConfig) -> None:
    config = trained / "config.yaml"
    more = [PHASES, CAPPED, WORKERS, "train.steps=40", "checkpoint.every=0"]
    run_trainings([(config, [*more, f"run_dir={trained / 'whole'}"])], ranks=1)
    run_dir = trained / "worker killed"
    job = subprocess.Popen(
        command("launch.train", str(config), *more, f"run_dir={run_dir}"),
        cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline, killed = time.monotonic() + 120, 0
    while job.poll() is None and time.monotonic() < deadline and not killed:
        metrics = run_dir / "metrics.jsonl"
        if metrics.exists() and metrics.read_text().count('"loss"') >= 3:
            job.send_signal(signal.SIGSTOP)  # so that it is still at work when they die
            for worker in psutil.Process(job.pid).children():
                os.kill(worker.pid, signal.SIGKILL)
                killed += 1
            job.send_signal(signal.SIGCONT)
        time.sleep(0.01)
    assert killed == 2
    assert job.wait(120) == 0
    assert "workers are started again, with the same data" in (run_dir / "log.txt").read_text()
    assert deterministic(run_dir) == deterministic(trained / "whole")
