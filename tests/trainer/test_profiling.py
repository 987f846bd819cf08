"""What a run measures of itself: phases add up, parts change no bit, traces and lagging ranks are what they say."""

import gzip
import json
import time
from pathlib import Path

import pytest
import torch

from tests.dist.test_resume import assert_same_run
from tests.harness import rows, run_trainings, tiny_config
from trainer import phases
from trainer.data.config import DataConfig
from trainer.gpu_peaks import find_peak, peak_flops
from trainer.phases import PhaseClock
from trainer.profiling import ProfileConfig, SlowRankWatch

CPU = torch.device("cpu")


def test_phases_exclude_each_other_and_add_up() -> None:
    clock = PhaseClock(CPU)
    with clock.phase("forward"):
        pass  # between two steps nothing is measured
    began = time.perf_counter()
    clock.start()
    clock.switch("other")
    with clock.phase("losses"):
        time.sleep(0.02)
        with clock.phase("hooks"):
            time.sleep(0.03)
        time.sleep(0.01)
    assert clock.current == "other"
    row = phases.metrics(clock.stop())
    spent = time.perf_counter() - began
    assert row["time/losses_s"] == pytest.approx(0.03, abs=0.008)
    assert row["time/hooks_s"] == pytest.approx(0.03, abs=0.008)
    assert sum(row.values()) == pytest.approx(spent, abs=0.002)
    assert row["time/forward_s"] == 0.0
    assert not [name for name in row if name.count("/") > 1], "nothing was divided"


def test_a_divided_phase_is_the_sum_of_its_parts() -> None:
    marks = [("forward", 0.0), ("forward/head", 1.0), ("forward", 3.0), ("backward", 4.0), ("", 6.0)]
    row = phases.metrics(marks)
    assert row["time/forward_s"] == 4.0
    assert row["time/forward/head_s"] == 2.0
    assert row["time/forward/engine_s"] == 2.0
    assert row["time/backward_s"] == 2.0
    assert "time/backward/engine_s" not in row


def test_a_phase_that_raises_is_left(tmp_path: Path) -> None:
    clock = PhaseClock(CPU)
    clock.start()
    with pytest.raises(KeyError), clock.phase("backward"):
        raise KeyError
    assert clock.current == "data"


def test_switching_costs_little() -> None:
    clock = PhaseClock(CPU)
    clock.start()
    spent = []
    for _ in range(5):
        began = time.process_time()
        for _ in range(1000):
            with clock.phase("forward"):
                pass
        spent.append((time.process_time() - began) / 1000)
    assert min(spent) < 1e-5, "some fifty of them a step: below 0.5 % of a step of a tenth of a second"


def lag(rank: int, spread: float, step: int = 1) -> dict[str, float]:
    return {"step": step, "loss": 1.0, "time/slowest_rank": rank, "time/rank_spread": spread}


def test_a_rank_that_lags_for_long_is_named_once() -> None:
    watch = SlowRankWatch(1.5, ["alpha", "beta"])
    assert [watch.look(lag(1, 2.0)) for _ in range(9)] == [None] * 9
    assert watch.look(lag(0, 1.1)) is None, "noise ends it"
    said = [watch.look(lag(1, 2.5, step)) for step in range(1, 31)]
    assert [index for index, line in enumerate(said) if line] == [9]
    assert "step 10: rank 1 (beta) takes 2.5 times as long" in str(said[9])
    assert not any(watch.look(lag(step % 2, 3.0)) for step in range(40)), "now one, now the other"
    quiet = SlowRankWatch(0, ["alpha", "beta"])
    assert not any(quiet.look(lag(1, 9.0)) for _ in range(20))
    assert watch.look({"step": 1, "loss": 1.0}) is None, "one rank has nobody to wait for"


def test_peaks_are_found_by_the_names_that_torch_gives() -> None:
    found = {
        "NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989.4e12,
        "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA B200": 2250e12, "NVIDIA GB200": 2500e12, "NVIDIA L40S": 362e12,
    }  # fmt: skip
    for name, bf16 in found.items():
        peak = find_peak(name)
        assert peak is not None
        assert peak.bf16 == bf16
    assert find_peak("NVIDIA RTX A1000") is None
    assert find_peak("NVIDIA L40") is None
    assert peak_flops(CPU, "bf16") is None


def test_what_would_be_ignored_is_refused() -> None:
    assert ProfileConfig().problems() == []
    assert ProfileConfig(trace_steps=(0,)).problems() == ["trace_steps: 0 is no step; they count from 1"]
    assert "trace_ranks" in ProfileConfig(trace_ranks=(-1,)).problems()[0]
    assert "slow_rank_factor" in ProfileConfig(slow_rank_factor=0.5).problems()[0]
    config = ProfileConfig(trace_steps=(5,), trace_ranks=(3,))
    assert config.run_problems(steps=4, world_size=2) == [
        "trace_steps: 5 is beyond the last step (4)", "trace_ranks: there is no rank 3 among 2",
    ]  # fmt: skip
    assert config.run_problems(steps=5, world_size=None) == []


MODEL = {"activation_recompute": "block", "mtp_weight": 0.1, "dropout": 0.1}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, data_config: DataConfig) -> dict[str, Path]:
    """Runs on two ranks, plain and measured: ZeRO 0 with recomputation and two passes, ZeRO 2 with shared experts."""
    folder = tmp_path_factory.mktemp("measured")
    short = {"train": {"steps": 4}, "evaluation": {"every": 4}, "checkpoint": {"every": 4}}
    hard = {"model": MODEL, "train": {"steps": 4, "accumulation": "two_pass"}}
    shared = {"engine": {"zero_stage": 2, "expert_parallel_size": 2}}
    trace = {"profile": {"breakdown": True, "trace_steps": [2], "trace_ranks": [1]}}
    variants = {
        "plain": short | hard, "parts": short | hard | trace,
        "shared": short | shared, "shared parts": short | shared | {"profile": {"breakdown": True}},
    }  # fmt: skip
    configs = [(tiny_config(folder / name, data_config, **sections), ()) for name, sections in variants.items()]
    run_trainings(configs, ranks=2)
    return {name: folder / name / "run" for name in variants}


def test_measuring_changes_no_bit(measured: dict[str, Path]) -> None:
    assert_same_run(measured["parts"], measured["plain"])
    assert_same_run(measured["shared parts"], measured["shared"])


def test_every_step_has_its_phases(measured: dict[str, Path]) -> None:
    for row in rows(measured["plain"]):
        if "loss" not in row:
            continue
        times = {name: float(row[f"time/{name}_s"]) for name in phases.PHASES}  # type: ignore[arg-type]
        assert sum(times.values()) == pytest.approx(float(row["time/step_s"]), rel=0.01)  # type: ignore[arg-type]
        assert all(times[name] > 0 for name in ("data", "forward", "losses", "hooks", "backward", "optimizer"))
        assert row["time/slowest_rank"] in (0, 1)
        assert float(row["time/rank_spread"]) >= 1  # type: ignore[arg-type]
        assert "mfu" not in row, "the peak of a CPU is not known"
        assert not [name for name in row if name.startswith("time/forward/")]


def test_parts_add_up_and_are_all_there(measured: dict[str, Path]) -> None:
    row = next(row for row in rows(measured["parts"]) if row.get("step") == 3)
    for phase in ("forward", "backward", "optimizer"):
        parts = {name: value for name, value in row.items() if name.startswith(f"time/{phase}/")}
        assert sum(parts.values()) == pytest.approx(row[f"time/{phase}_s"], rel=1e-6)  # type: ignore[arg-type]
    both = ("embedding", "attention", "dense", "router", "experts", "shared", "head", "norm", "backbone", "engine")
    expected = [f"forward/{part}" for part in (*both, "dispatch", "next_token")] + [f"backward/{part}" for part in both]
    expected += ["backward/recompute", "backward/reduce", "optimizer/adam", "optimizer/engine"]
    assert {f"time/{name}_s" for name in expected} <= row.keys()
    shared = next(row for row in rows(measured["shared parts"]) if row.get("step") == 3)
    expected = [f"{phase}/{part}" for phase in ("forward", "backward") for part in ("dispatch", "experts", "combine")]
    assert all(float(shared[f"time/{name}_s"]) > 0 for name in (*expected, "backward/reduce", "optimizer/clip"))  # type: ignore[arg-type]


def test_a_trace_is_of_the_chosen_step_and_rank(measured: dict[str, Path]) -> None:
    (path,) = (measured["parts"] / "profile").iterdir()
    assert path.name == "step-00000002-rank1.json.gz"
    with gzip.open(path) as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"forward", "backward", "optimizer", "hooks", "losses", "aten::mm"} <= names
    assert not (measured["plain"] / "profile").exists()


def test_steps_that_a_start_does_not_come_to_are_named(tmp_path: Path, data_config: DataConfig) -> None:
    config = tiny_config(tmp_path, data_config, evaluation={"every": 0})
    first = ["train.steps=3", "profile.trace_steps=[2]"]
    again = ["train.steps=5", "profile.trace_steps=[3,1,2,5]", "profile.trace_ranks=[1]"]
    run_trainings([(config, first), (config, again)], ranks=2)
    said = [line for line in (tmp_path / "run" / "log.txt").read_text().splitlines() if "no trace of" in line]
    assert [line.split("] ")[1] for line in said] == [
        "profile.trace_steps: no trace of step 1, step 3: this start goes on after step 3"
    ]
    traced = {path.name for path in (tmp_path / "run" / "profile").iterdir()}
    assert traced == {"step-00000002-rank0.json.gz", "step-00000005-rank1.json.gz"}, "step 2 was traced before"
