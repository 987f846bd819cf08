"""`launch.profile` measures the real loop, from a config and from a run, and draws one file that needs no network."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from launch._step_profile import BETWEEN, StepProfile, boxes, mean_over_ranks, operations_by_part, step_profile
from tests.harness import ROOT, command, environment, run, tiny_config
from trainer.data.config import DataConfig
from trainer.phases import MARK

PARTS = ("embedding", "attention", "norm", "dense", "router", "dispatch", "experts", "shared", "head")


def test_a_config_on_two_ranks_and_its_run(tmp_path: Path, data_config: DataConfig) -> None:
    config = tiny_config(tmp_path, data_config, train={"steps": 4}, evaluation={"every": 4})
    out = tmp_path / "out"
    done = run("launch.profile", str(config), "--steps", "2", "--warmup", "1", "--out", str(out), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 x CPU, fp32, ZeRO 0" in done.stdout
    assert all(f" {part} " in done.stdout for part in (*PARTS, "reduce", "optimizer/adam", "hooks", BETWEEN))
    facts = json.loads((out / "profile.json").read_text())
    seconds = facts["seconds"]
    assert facts["total_s"] == pytest.approx(sum(value for name, value in seconds.items() if "/" not in name))
    assert seconds["forward"] == pytest.approx(sum(v for name, v in seconds.items() if name.startswith("forward/")))
    assert facts["operations"]["forward/attention"]["aten::mm"] > 0
    assert "CpuExpertsBackward" in facts["operations"]["backward/experts"]
    text = (out / "profile.html").read_text()
    assert "forward\\u002fattention" in text or "forward/attention" in text
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=", text), "nothing is fetched"
    assert not (out / "checkpoints").exists()
    assert not (tmp_path / "run").exists(), "the run itself is not touched"

    trained = run("launch.train", str(config))
    assert trained.returncode == 0, trained.stderr[-3000:]
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = run("launch.profile", str(tmp_path / "run"), "--steps", "1", "--warmup", "1")
    assert again.returncode == 0, again.stderr[-3000:]
    assert (tmp_path / "run" / "profile" / "profile.html").exists()
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert "initial weights" not in again.stderr


def test_asked_to_stop_it_ends_with_75_and_writes_nothing(tmp_path: Path, data_config: DataConfig) -> None:
    config = tiny_config(tmp_path, data_config, data={"max_epochs": {}})
    words = command("launch.profile", str(config), "--steps", "20", "--warmup", "20000", "--out", str(tmp_path / "out"))
    process = subprocess.Popen(words, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    seen = ""
    while "keep their graphs" not in seen:  # said in the first step
        line = process.stderr.readline()
        assert line, seen
        seen += line
    process.terminate()
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 75, rest[-2000:]
    assert "stopped before all steps were measured" in rest
    assert "Traceback" not in rest
    assert not (tmp_path / "out" / "profile.json").exists()


def test_wrong_arguments_are_one_line(tmp_path: Path) -> None:
    done = run("launch.profile", "configs/debug.yaml", "--steps", "0")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == "error: --steps: 0 must be at least 1"


def rows() -> list[dict[str, float]]:
    step = {"time/step_s": 1.0, "time/forward_s": 0.4, "time/forward/head_s": 0.3, "time/forward/engine_s": 0.1}
    return [{**step, "time/backward_s": 0.5, "time/other_s": 0.1, "tokens_per_s": 10.0} for _ in range(2)]


def test_a_profile_adds_up() -> None:
    profile = step_profile(rows(), wall_s=2.4)
    assert profile.seconds[BETWEEN] == pytest.approx(0.2)
    assert profile.total == pytest.approx(1.2)
    assert list(profile.parts("forward")) == ["forward/head", "forward/engine"]
    other = StepProfile({name: 3 * value for name, value in profile.seconds.items()}, 2, 10.0)
    assert mean_over_ranks([profile, other]).total == pytest.approx(2.4)


class Event:
    device_type = "DeviceType.CPU"

    def __init__(self, name: str, start: float, end: float, own: float) -> None:
        self.name, self.self_cpu_time_total = name, own
        self.time_range = type("Range", (), {"start": start, "end": end})()


def test_operations_belong_to_the_part_they_begin_in() -> None:
    events = [
        Event(f"{MARK}forward/head", 0, 0, 0), Event("aten::mm", 1, 5, 4), Event("aten::add", 5, 6, 1),
        Event(f"{MARK}backward", 10, 10, 0), Event("aten::mm", 12, 20, 8), Event("forward", 0, 10, 3),
        Event("backward/reduce", 10, 20, 2),
    ]  # fmt: skip
    shares = operations_by_part(events, on_cuda=False)
    assert shares == {"forward/head": {"aten::mm": 0.4, "aten::add": 0.1}, "backward": {"aten::mm": 0.8}}
    profile = step_profile(rows(), wall_s=2.0)
    profile.operations = shares
    drawn = {name: (parent, seconds) for name, parent, _, seconds in boxes(profile)}
    assert drawn["forward/head:aten::mm"] == ("forward/head", pytest.approx(0.12))
    assert drawn["forward/head:between operations"] == ("forward/head", pytest.approx(0.15))
    assert drawn["backward:aten::mm"] == ("backward", pytest.approx(0.4))
    for name, (_, seconds) in drawn.items():
        inside = sum(value for parent, value in drawn.values() if parent == name)
        assert inside <= seconds * (1 + 1e-9), "no box is larger than the one around it"
