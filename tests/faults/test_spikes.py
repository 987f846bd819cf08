"""Losses that shoot up: told, dropped, or the reason to go back to a checkpoint from before."""

import json
import re
from pathlib import Path

import pytest

from tests.faults.faultkit import Job, Leg, Outcome, checkpoints, strike
from tests.harness import deterministic, rows, tiny_config
from trainer.data.config import DataConfig

pytestmark = pytest.mark.slow

REWIND = {"policy": "rewind", "window": 8, "patience": 2, "rewind_steps": 2, "max_rewinds": 1}


def config_of(folder: Path, data: DataConfig, every: int = 2, **spikes: object) -> Path:
    return tiny_config(
        folder, data, train={"steps": 18, "micro_batch_size": 4, "spikes": spikes}, evaluation={"every": 0},
        checkpoint={"every": every, "keep": 3},
    )  # fmt: skip


def applied(run_dir: Path) -> dict[int, int]:
    return {int(row["step"]): int(row["step/applied"]) for row in rows(run_dir) if "loss" in row}  # type: ignore[call-overload]


def spikes(run_dir: Path) -> list[int]:
    return [int(row["step"]) for row in rows(run_dir) if row.get("step/spike")]  # type: ignore[call-overload]


def steps_after_window(run_dir: Path) -> list[dict[str, object]]:
    """What steps after the twelfth recorded; the average over all steps knows of the window."""
    found = [row for row in deterministic(run_dir) if "loss" in row and int(row["step"]) > 12]  # type: ignore[call-overload]
    return [{key: value for key, value in row.items() if key != "loss/ema"} for row in found]


@pytest.fixture(scope="module")
def rewound(tmp_path_factory: pytest.TempPathFactory, data_config: DataConfig) -> dict[str, Outcome]:
    """Two spikes in a row send the run back from step 12 to 8; later it is killed, started again, and ends."""
    folder = tmp_path_factory.mktemp("rewound")
    legs = {"killed": Leg("scale=1000@0:11:forward,scale=1000@0:12:forward,kill@0:15:before_step")}
    return strike(config_of(folder, data_config, **REWIND), folder / "run", legs, ranks=0)


@pytest.fixture(scope="module")
def without_window(tmp_path_factory: pytest.TempPathFactory, data_config: DataConfig) -> Path:
    """The same run, but the batches from step 9 to 12 were never any good: nothing of them was applied."""
    folder = tmp_path_factory.mktemp("without")
    config = config_of(folder, data_config, policy="off")
    faults = ",".join(f"scale=nan@0:{step}:forward" for step in (9, 10, 11, 12))
    job = Job(config, folder / "run", ranks=0, fault=faults)
    assert job.end() == 0, job.log[-3000:]
    return folder / "run"


@pytest.mark.fault(13, "loss spikes, policy rewind")
def test_a_rewind_goes_back_and_skips_exactly_the_window(rewound: dict[str, Outcome], without_window: Path) -> None:
    run_dir = rewound["end"].job.run_dir
    assert rewound["end"].code == 0, rewound["end"].job.log[-3000:]
    log = rewound["killed"].job.log
    assert "went back to step 8, samples 64 to 95 do not count (rewind 1 of 1)" in log
    assert spikes(run_dir) == [11, 12]
    assert [step for step, done in applied(run_dir).items() if not done] == [11, 12]
    after, expected = steps_after_window(run_dir), steps_after_window(without_window)
    assert len(after) == 6
    assert after == expected, "as if the window had never been trained on"


@pytest.mark.fault(13, "loss spikes, policy rewind")
def test_a_rewind_leaves_no_checkpoint_of_the_window(rewound: dict[str, Outcome]) -> None:
    assert 10 not in rewound["killed"].after
    assert {8, 12} <= rewound["killed"].after.keys()
    assert re.search("resumed from step 1[24]", rewound["end"].job.log), "not from before the rewind"


@pytest.mark.fault(13, "loss spikes again after the last rewind")
def test_spikes_without_end_are_exit_4(tmp_path: Path, data_config: DataConfig) -> None:
    faults = ",".join(f"scale=1000@0:{step}:forward" for step in (11, 12, 13, 14))
    job = Job(config_of(tmp_path, data_config, **REWIND), tmp_path / "run", ranks=0, fault=faults)
    assert job.end() == 4, job.log[-3000:]
    assert "loss spikes again after 1 rewinds" in job.errors[0]
    assert checkpoints(tmp_path / "run")


@pytest.mark.fault(13, "loss spikes, policy rewind, a hook sets the sampling")
def test_a_rewind_takes_back_the_mixture_that_a_hook_had_asked_for(tmp_path: Path, data_config: DataConfig) -> None:
    """The hook asks at steps 10 and, of the way back to step 8 knowing nothing, 14; each acts two steps later."""
    doremi = {
        "rule": "doremi", "target": "sampling", "eta": 3.0, "every": 10,
        "reference_losses": {"code": 5.0, "prose": 3.0, "table": 5.5},
    }  # fmt: skip
    config = config_of(tmp_path, data_config, **REWIND)
    overrides = ["data.sampling_delay=2", f"hooks.domain_reweight={doremi}", "hooks.sample_reweight.enabled=false"]
    faults = "scale=1000@0:11:forward,scale=1000@0:12:forward"
    whole = Job(config, tmp_path / "whole", *overrides, ranks=0, fault=faults)
    assert whole.end() == 0, whole.log[-3000:]
    state = json.loads((tmp_path / "whole/checkpoints/step-00000018/state.json").read_text())
    (first, even), (tenth, moved), (rewound, again), (later, anew) = state["trainer"]["plan"]["changes"]
    assert (first, tenth, rewound, later) == (0, 12, 14, 16)
    assert again == even
    assert len({tuple(even), tuple(moved), tuple(anew)}) == 3
    killed = Job(config, tmp_path / "cut", *overrides, ranks=0, fault=f"{faults},kill@0:13:before_step")
    assert killed.end() == -9, killed.log[-3000:]
    resumed = Job(config, tmp_path / "cut", *overrides, ranks=0)
    assert resumed.end() == 0, resumed.log[-3000:]
    assert "resumed from step 12" in resumed.log
    assert deterministic(tmp_path / "cut") == deterministic(tmp_path / "whole")


@pytest.mark.fault(13, "loss spikes before any checkpoint is old enough")
def test_spikes_from_which_there_is_no_way_back_are_skipped(tmp_path: Path, data_config: DataConfig) -> None:
    early = REWIND | {"rewind_steps": 4, "max_rewinds": 2}  # the first checkpoint is of step 6
    faults = ",".join(f"scale=1000@0:{step}:forward" for step in (9, 10, 11, 17, 18))
    config = config_of(tmp_path, data_config, every=6, **early)
    job = Job(config, tmp_path / "run", "train.steps=20", ranks=0, fault=faults)
    assert job.end() == 0, job.log[-3000:]
    assert [step for step, done in applied(tmp_path / "run").items() if not done] == [9, 10, 11, 17, 18]
    assert job.log.count("no checkpoint is old enough to go back to") == 1, "once a row"
    assert "step 10: 2 spikes in a row, but no checkpoint is old enough" in job.log
    assert "step 18: 2 spikes in a row; weights, optimizer and hooks went back to step 12" in job.log


@pytest.mark.fault(13, "loss spike, policies log and skip")
@pytest.mark.parametrize("policy", ["log", "skip"])
def test_a_spike_is_told_or_dropped(policy: str, tmp_path: Path, data_config: DataConfig) -> None:
    config = config_of(tmp_path, data_config, policy=policy, window=8)
    job = Job(config, tmp_path / "run", ranks=2, fault="scale=1000@1:11:forward")
    assert job.end() == 0, job.log[-3000:]
    assert spikes(tmp_path / "run") == [11]
    assert applied(tmp_path / "run")[11] == (policy == "log")
    assert "is a spike" in job.log
    assert ("step 11 skipped" in job.log) == (policy == "skip")
