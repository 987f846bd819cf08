"""A run goes on with other ranks, another ZeRO stage and other expert parallelism, and stays the same run."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.dist.test_resume import newest_weights
from tests.harness import ROOT, command, environment, losses, rows, run, run_trainings, tiny_config
from trainer.data.config import DataConfig

STEPS, EVERY = 20, 2
LEGS = {
    "4 ranks, ZeRO 2, EP 2": (4, ["engine.zero_stage=2", "engine.expert_parallel_size=2", "train.micro_batch_size=1"]),
    "2 ranks, ZeRO 3, offload": (2, ["engine={zero_stage: 3, offload_optimizer: true}", "engine.zero_options={stage3_param_persistence_threshold: 0}"]),
    "1 rank, ZeRO 0": (1, ["engine.zero_stage=0", "train.micro_batch_size=4"]),
    "4 ranks, ZeRO 1, EP 4, SP 2": (
        4, ["engine={zero_stage: 1, expert_parallel_size: 4, sequence_parallel_size: 2}"]
    ),
}


@pytest.mark.fault(24, "killed, resumed on 4, 2, 1, 4 ranks, other ZeRO and EP")
def test_four_two_one_four_ranks_with_kills_in_between(tmp_path: Path, data_config: DataConfig) -> None:
    # Twenty steps: this model amplifies rounding, of sums in another order, tenfold in each two or three after that.
    slow = {"hook": "tests.dist.hooks:Slow", "seconds": 0.15}
    config = tiny_config(
        tmp_path, data_config, train={"steps": STEPS}, checkpoint={"every": EVERY}, hooks={"slow": slow}
    )
    run_trainings([(config, [f"run_dir={tmp_path / 'unbroken'}"])], ranks=1)

    run_dir = tmp_path / "elastic"
    *killed, last = LEGS.values()
    for ranks, overrides in killed:
        before = newest_step(run_dir)
        job = subprocess.Popen(
            command("launch.train", str(config), f"run_dir={run_dir}", *overrides, ranks=ranks),
            cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        while newest_step(run_dir) < before + 2 * EVERY:
            assert job.poll() is None, "the job ended before it could be killed"
            time.sleep(0.02)
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        assert len(losses(run_dir)) < STEPS, "the kill came after the end"
    done = run("launch.train", str(config), f"run_dir={run_dir}", *last[1], ranks=last[0])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "saved by 1 ranks, resumed by 4" in done.stderr

    steps = [row for row in rows(run_dir) if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1)), "every sample once"
    assert losses(run_dir) == pytest.approx(losses(tmp_path / "unbroken"), rel=1e-5)
    expected, found = newest_weights(tmp_path / "unbroken"), newest_weights(run_dir)
    for name, tensor in expected.items():
        if name.endswith("expert_bias_E"):  # a token whose scores tie may turn one step of one expert up, of one down
            assert ((found[name] - tensor).abs() > 1e-6).sum() <= 2, name
        else:
            assert (found[name] - tensor).norm() <= 1e-4 * tensor.norm(), name


def newest_step(run_dir: Path) -> int:
    return max((int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-*")), default=0)


@pytest.mark.parametrize(
    ("precision", "stage"),
    [("bf16", 0), *(pytest.param(p, s, marks=pytest.mark.slow) for p, s in [("fp32", 0), ("bf16", 1), ("bf16", 2)])],
)
def test_a_new_engine_has_taken_no_step(precision: str, stage: int, tmp_path: Path, data_config: DataConfig) -> None:
    """DeepSpeed's bf16 optimizer of stage 0 steps once on zero gradients when it is made: that is undone."""
    config = tiny_config(
        tmp_path, data_config, engine={"precision": precision, "zero_stage": stage}, optimizer={"weight_decay": 0.5}
    )
    done = run("tests.dist.fresh_engine", str(config))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-2:] == ["0.0", "0.0"]
