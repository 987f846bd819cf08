"""What may be wrong around a run: the clock of a rank, W&B, the disk, another job, the rendezvous, its own memory."""

import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.dist.test_resume import assert_same_run
from tests.faults.conftest import EVERY
from tests.faults.faultkit import (
    TIMEOUT_S,
    Job,
    Record,
    Reference,
    assert_begins_like,
    checkpoints,
    digests,
    leftovers,
    lost_steps,
)
from tests.harness import deterministic, rows, run, run_trainings, tiny_config
from trainer.data.config import DataConfig

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def slow(two_ranks: Reference) -> Job:
    """A finished run of slow ranks and disks, one of which fails once."""
    run_dir = two_ranks.config.parent / "slow"
    faults = (
        "sleep=4@1:5:forward", "sleep=4@0:8:save_start", "sleep=4@1:10:save_write", "sleep=4@0:12:save_before_rename",
        "io_error@1:14:save_write",
    )  # fmt: skip
    job = Job(two_ranks.config, run_dir, ranks=2, fault=",".join(faults))
    assert job.end() == 0, job.log[-3000:]
    return job


@pytest.mark.fault(28, "slow rank, slow disk")
def test_slowness_is_no_failure(slow: Job, two_ranks: Reference) -> None:
    assert_same_run(slow.run_dir, two_ranks.run_dir)
    (fifth,) = [row for row in rows(slow.run_dir) if row.get("step") == 5 and "loss" in row]
    assert float(fifth["time/step_s"]) > 4, "the slow step is on record"  # type: ignore[arg-type]
    assert fifth["time/slowest_rank"] == 1
    assert float(fifth["time/rank_spread"]) > 10  # type: ignore[arg-type]


@pytest.mark.fault(28, "slow disk does not hold training")
def test_training_goes_on_while_a_slow_disk_writes(slow: Job) -> None:
    found = re.search(r"checkpoint of step 8 saved in ([0-9.]+) s; it held training ([0-9.]+) s", slow.log)
    assert found, slow.log[-3000:]
    assert float(found[1]) >= 4
    assert float(found[2]) < 2


@pytest.mark.fault(9, "one input/output error in save")
def test_what_fails_once_is_tried_again(slow: Job) -> None:
    assert "checkpoint of step 14: rank 1: [Errno 5] Input/output error" in slow.log
    assert "trying once more" in slow.log
    assert not leftovers(slow.run_dir)


@pytest.mark.fault(28, "a rank that is slow for long is named")
def test_a_rank_that_lags_is_named(two_ranks: Reference) -> None:
    run_dir = two_ranks.config.parent / "lagging"
    job = Job(two_ranks.config, run_dir, ranks=2, fault=",".join(f"sleep=0.3@1:{n}:forward" for n in range(3, 16)))
    assert job.end() == 0, job.log[-3000:]
    assert_same_run(run_dir, two_ranks.run_dir)
    (line,) = [line for _, line in job.lines if "times as long as the median rank" in line]
    assert f"rank 1 ({socket.gethostname()})" in line


@pytest.mark.fault(28, "wall clock set back and forward")
def test_a_clock_that_jumps_is_no_failure(two_ranks: Reference) -> None:
    run_dir = two_ranks.config.parent / "jumping clock"
    jumps = "clock=-86400@1:3:forward,clock=7200@0:5:forward,clock=-9000@0:8:save_write,clock=90000@1:10:save_start"
    job = Job(two_ranks.config, run_dir, ranks=2, fault=jumps)
    assert job.end() == 0, job.log[-3000:]
    assert job.log.count("fault: clock") == 4
    assert_same_run(run_dir, two_ranks.run_dir)
    seconds = [
        float(value)  # type: ignore[arg-type]
        for row in rows(run_dir)
        for name, value in row.items()
        if name.startswith("time/") and name.endswith("_s")
    ]
    seconds += [float(text) for text in re.findall(r"(?:saved in|held training) ([0-9.]+) s", job.log)]
    assert len(seconds) > 16
    assert all(0 <= value < 60 for value in seconds), "durations are not differences of wall clocks"
    assert "times as long as the median rank" not in job.log, "no rank is taken for slow"


@pytest.mark.fault(2, "all ranks and the launcher killed (-9) at random")
@pytest.mark.parametrize("seed", range(3))
def test_all_killed_at_random(seed: int, two_ranks: Reference, record_property: Record) -> None:
    run_dir = two_ranks.config.parent / f"random {seed}"
    dice = random.Random(seed)
    job = Job(two_ranks.config, run_dir, ranks=2, fault=f"sleep=1@0:{dice.randint(3, 14)}:forward")
    job.when("fault:")
    time.sleep(1.5 * dice.random())
    job.send(signal.SIGKILL, to="all")
    assert job.end() == -signal.SIGKILL
    record_property("steps_lost", lost_steps(run_dir))
    assert lost_steps(run_dir) <= 2 * EVERY
    assert_begins_like(deterministic(run_dir), two_ranks.run_dir)
    again = Job(two_ranks.config, run_dir, ranks=2)
    assert again.end() == 0, again.log[-3000:]
    assert_same_run(run_dir, two_ranks.run_dir)
    assert not leftovers(run_dir)


@pytest.fixture
def black_hole() -> Iterator[str]:
    """The address of a server that accepts and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.fault(20, "W&B never answers")
def test_wandb_that_never_answers(black_hole: str, one_rank: Reference, record_property: Record) -> None:
    run_dir = one_rank.config.parent / "black hole"
    env = {"WANDB_MODE": "online", "WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": black_hole}
    job = Job(one_rank.config, run_dir, "wandb.mode=online", ranks=0, **env)
    trained = job.when(f"step {deterministic(one_rank.run_dir)[-1]['step']} held-out")
    assert job.end() == 0, job.log[-3000:]
    assert time.monotonic() - trained < 30, "the run waits for its copy no longer than it promises"
    assert job.log.count("W&B ") == 1, "said once"
    assert_same_run(run_dir, one_rank.run_dir)


@pytest.mark.fault(20, "W&B raises in the middle of the run")
def test_wandb_that_raises(one_rank: Reference) -> None:
    run_dir = one_rank.config.parent / "raising"
    job = Job(one_rank.config, run_dir, "wandb.mode=offline", ranks=0, fault="wandb_raises@0:3:forward")
    assert job.end() == 0, job.log[-3000:]
    # It meets whatever the sink's thread sends next: numbers or a picture.
    assert "(BrokenPipeError: the service is gone); training goes on" in job.log
    assert_same_run(run_dir, one_rank.run_dir)


@pytest.mark.fault(9, "checkpoint folder vanishes in save")
def test_a_folder_that_vanishes_is_exit_6(one_rank: Reference) -> None:
    run_dir = one_rank.config.parent / "vanished"
    job = Job(one_rank.config, run_dir, ranks=0, fault="vanish@0:4:save_write")
    assert job.end() == 6, job.log[-3000:]
    assert len(job.errors) == 1
    assert "cannot write the checkpoint of step 4" in job.errors[0]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system for a few checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.fault(8, "disk fills up (tmpfs)")
def test_a_full_disk_is_exit_6(small_disk: Path, one_rank: Reference, record_property: Record) -> None:
    run_dir = small_disk / "run"
    job = Job(one_rank.config, run_dir, "checkpoint.keep=9", ranks=0)
    assert job.end() == 6, job.log[-3000:]
    assert "MiB are free" in job.errors[-1]
    assert str(run_dir) in job.errors[-1]
    before = digests(run_dir)
    assert before, "some were saved before the disk was full"
    record_property("steps_lost", lost_steps(run_dir))
    assert not leftovers(run_dir)
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)  # somebody makes room
    again = Job(one_rank.config, run_dir, ranks=0)
    assert again.end() == 0, again.log[-3000:]
    assert_same_run(run_dir, one_rank.run_dir)


@pytest.mark.fault(27, "two jobs, one run folder")
def test_the_second_job_is_refused_and_a_dead_one_holds_nothing(one_rank: Reference) -> None:
    run_dir = one_rank.config.parent / "twice"
    first = Job(one_rank.config, run_dir, ranks=0, fault="sleep=15@0:3:forward")
    first.when("fault:")
    second = run("launch.train", str(one_rank.config), f"run_dir={run_dir}")
    assert second.returncode == 3
    assert "is in use by process" in second.stderr.splitlines()[-1]
    first.send(signal.SIGKILL)
    assert first.end() == -signal.SIGKILL
    third = Job(one_rank.config, run_dir, ranks=0)
    assert third.end() == 0, "the lock of a dead job is free"
    assert_same_run(run_dir, one_rank.run_dir)


@pytest.fixture(scope="module")
def changed(one_rank: Reference) -> Path:
    """The newest checkpoints of a finished run taken away, and the rest trained again under changed settings."""
    folder = one_rank.config.parent / "changed"
    plan = {
        "learning rate": ["optimizer.learning_rate=1e-3"],
        "hook off": ["hooks.sample_reweight.enabled=false", "hooks.expert_bias.enabled=false"],
        "hook on": ["hooks.mine.hook=tests.faults.hooks:Memory"],
    }
    for name in plan:
        shutil.copytree(one_rank.run_dir, folder / name)
        shutil.rmtree(folder / name / "checkpoints" / f"step-{checkpoints(one_rank.run_dir)[-1]:08d}")
    run_trainings([(one_rank.config, [f"run_dir={folder / n}", *o]) for n, o in plan.items()], ranks=0)
    return folder


@pytest.mark.fault(22, "allowed change of configuration at resume")
def test_a_changed_learning_rate_is_logged(changed: Path) -> None:
    log = (changed / "learning rate" / "log.txt").read_text()
    assert "config changed since the last start of this run: optimizer.learning_rate: 0.003 -> 0.001" in log


@pytest.mark.fault(26, "hook on or off at resume")
def test_hooks_that_come_and_go_are_logged(changed: Path) -> None:
    gone = (changed / "hook off" / "log.txt").read_text()
    assert "hooks.expert_bias is saved in the checkpoint but not in this run: its state is dropped" in gone
    assert "hooks.mine is new in this run" in (changed / "hook on" / "log.txt").read_text()


@pytest.mark.timeout(900)
@pytest.mark.fault(29, "memory over 2000 steps")
def test_memory_is_flat(tmp_path: Path, data_config: DataConfig) -> None:
    config = tiny_config(
        tmp_path, data_config, train={"steps": 2000, "micro_batch_size": 8}, checkpoint={"every": 50},
        evaluation={"every": 100, "max_rows": 1}, hooks={"memory": {"hook": "tests.faults.hooks:Memory"}},
    )  # fmt: skip
    done = run("launch.train", str(config), timeout=800)
    assert done.returncode == 0, done.stderr[-2000:]
    memory = np.array([row["test/rss_mib"] for row in rows(tmp_path / "run") if "loss" in row])
    settled = memory[500:]
    slope = np.polyfit(np.arange(len(settled)), settled, 1)[0] * 100
    print(f"{memory[0]:.0f} -> {memory[-1]:.0f} MiB, {slope:.2f} MiB / 100 steps after step 500")
    assert slope < 1.0, f"{slope:.2f} MiB per 100 steps"


@pytest.mark.fault(30, "rendezvous absent")
def test_a_rendezvous_that_is_not_there_is_exit_5(
    tmp_path: Path, data_config: DataConfig, record_property: Record
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    config = tiny_config(tmp_path, data_config, engine={"collective_timeout_s": TIMEOUT_S})
    start = time.monotonic()
    done = run(
        "launch.train", str(config),
        RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
    )  # fmt: skip
    record_property("detected_in", time.monotonic() - start)
    assert done.returncode == 5, done.stderr[-2000:]
    assert f"127.0.0.1:{port}" in done.stderr.splitlines()[-1]
    assert time.monotonic() - start < 60
