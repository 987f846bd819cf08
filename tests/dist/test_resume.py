"""A run that was cut off and started again is the run that was never cut off, bit for bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.harness import ROOT, command, deterministic, environment, run, run_trainings, tiny_config
from trainer.data.config import DataConfig

LAYOUTS = {
    f"{precision} ZeRO {stage}": [f"engine.precision={precision}", f"engine.zero_stage={stage}", "model.dropout=0.1"]
    for precision in ("fp32", "bf16")
    for stage in (0, 1, 2)
} | {
    f"{precision} ZeRO 3": [
        f"engine.precision={precision}", "engine.zero_stage=3", "model.dropout=0.1",
        "engine.zero_options={stage3_param_persistence_threshold: 0}",
    ]
    for precision in ("fp32", "bf16")
} | {
    f"{precision} ZeRO {stage} EP 2": [
        f"engine.precision={precision}", f"engine.zero_stage={stage}", "model.dropout=0.1", "engine.expert_parallel_size=2",
    ]
    for precision in ("fp32", "bf16")
    for stage in (1, 2)
} | {
    "fp32 ZeRO 1 offload, SP 2": [
        "engine={zero_stage: 1, offload_optimizer: true, sequence_parallel_size: 2}", "model.dropout=0.1",
    ],
    "bf16 ZeRO 2 EP 2 offload": [
        "engine={precision: bf16, zero_stage: 2, offload_optimizer: true, expert_parallel_size: 2}", "model.dropout=0.1",
    ],
    "bf16 ZeRO 3 offload, SP 2": [
        "engine={precision: bf16, zero_stage: 3, offload_optimizer: true, sequence_parallel_size: 2}", "model.dropout=0.1",
        "engine.zero_options={stage3_param_persistence_threshold: 0}",
    ],
}  # fmt: skip


def newest_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    newest = max((run_dir / "checkpoints").glob("step-*"))
    return safetensors.torch.load_file(newest / "model.safetensors")


def assert_same_run(run_dir: Path, expected_dir: Path) -> None:
    assert deterministic(run_dir) == deterministic(expected_dir)
    weights, expected = newest_weights(run_dir), newest_weights(expected_dir)
    assert weights.keys() == expected.keys()
    assert any(key.endswith("expert_bias_E") for key in weights)
    for key, tensor in expected.items():
        assert torch.equal(weights[key], tensor), key


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, data_config: DataConfig) -> Path:
    """For each layout a whole run, and one that goes on in a new process from what a kill after step 6 leaves."""
    folder = tmp_path_factory.mktemp("resume")
    config = tiny_config(folder, data_config, checkpoint={"every": 4, "keep": 3})
    run_trainings([(config, [*o, f"run_dir={folder / name}"]) for name, o in LAYOUTS.items()], ranks=2)
    for name in LAYOUTS:
        cut = folder / f"{name} cut"
        shutil.copytree(folder / name, cut)
        for later in ("step-00000008", "step-00000012"):
            shutil.rmtree(cut / "checkpoints" / later)
        (cut / "checkpoints" / "tmp-step-00000008").mkdir()
        lines = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] <= 6]
        (cut / "metrics.jsonl").write_text("".join(kept) + lines[-1][:50])  # the kill came while a line was written
    run_trainings([(config, [*o, f"run_dir={folder / f'{name} cut'}"]) for name, o in LAYOUTS.items()], ranks=2, new_process=True)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resumed_run_equals_unbroken_run(layout: str, resumed: Path) -> None:
    assert_same_run(resumed / f"{layout} cut", resumed / layout)
    assert not list((resumed / f"{layout} cut" / "checkpoints").glob("tmp-*")), "remains of the kill are cleared"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, data_config: DataConfig) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("kill")
    # A phase that begins in the midst of a step, a cap on the way, and workers that die with the job.
    data = {"num_workers": 1, "max_epochs": {"table": 0.01}, "phases": [{"from_sample": 203, "weights": {"code": 1}}]}
    config = tiny_config(folder, data_config, train={"steps": 60}, checkpoint={"every": 5}, data=data)
    run_trainings([(config, [f"run_dir={folder / 'unbroken'}"])], ranks=2)
    return config, folder / "unbroken"


@pytest.mark.fault(2, "all ranks and the launcher killed (-9) at random")
def test_sigkill_at_a_random_step(unbroken: tuple[Path, Path]) -> None:
    config, expected = unbroken
    run_dir = config.parent / "killed"
    job = subprocess.Popen(
        command("launch.train", str(config), f"run_dir={run_dir}", ranks=2),
        cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    kill_after = random.Random(os.getpid()).randint(6, 50)
    wait_for_step(run_dir, kill_after, job)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    time.sleep(2)  # ranks that outlived their launcher would train on
    assert len(deterministic(run_dir)) < len(deterministic(expected)), "the kill came after the end"

    done = run("launch.train", str(config), f"run_dir={run_dir}", ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resumed from step" in done.stderr
    assert_same_run(run_dir, expected)


@pytest.mark.fault(18, "SIGTERM to a single process")
def test_sigterm_saves_exits_75_and_loses_no_step(unbroken: tuple[Path, Path]) -> None:
    config, expected = unbroken
    run_dir = config.parent / "preempted"
    job = subprocess.Popen(
        command("launch.train", str(config), f"run_dir={run_dir}"),
        cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for_step(run_dir, 7, job)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 75
    last = deterministic(run_dir)[-1]["step"]
    assert (run_dir / "checkpoints" / f"step-{last:08d}" / "MANIFEST.json").exists()

    done = run("launch.train", str(config), f"run_dir={run_dir}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"resumed from step {last}" in done.stderr
    assert len(deterministic(run_dir)) == len(deterministic(expected))


def wait_for_step(run_dir: Path, step: int, job: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert job.poll() is None, "the job ended before it could be stopped"
        metrics = run_dir / "metrics.jsonl"
        if metrics.exists() and metrics.read_text().count('"loss"') >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} did not come")
