"""`launch.wandb`: what a server has missed is sent later, and a project's panels are a file."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch._cli import run_command
from launch.wandb import main
from tests import long_record
from tests.faults.faultkit import Job
from tests.harness import deterministic, environment, rows, run, tiny_config
from tests.trainer.test_wandb import online
from tests.wandb_server import ENTITY, WandbServer, wandb_server
from trainer.data.config import DataConfig
from trainer.wandb_sink import end_service, run_id


def train_while_the_server(mood: str, folder: Path, data_config: DataConfig) -> tuple[Path, Job, float]:
    """A real run whose server is well at first; its folder, its job, and the seconds it took after its last step."""
    config = tiny_config(folder, data_config, train={"steps": 12}, wandb={"mode": "online"})
    run_dir = folder / "run"
    with wandb_server() as server:
        # The pause lets W&B open the run and send its first rows.
        job = Job(config, run_dir, ranks=0, fault="sleep=8@0:4:forward", **online(server.url))
        deadline = time.monotonic() + 60
        while "UpsertBucket" not in server.calls and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "UpsertBucket" in server.calls, job.log
        if mood == "dies":
            server.die()
        else:
            server.mood = "stalling" if mood == "stalls" else "failing"
        trained = job.when("step 12 held-out")
        assert job.end() == 0, job.log[-3000:]
    return run_dir, job, time.monotonic() - trained


@pytest.mark.fault(20, "W&B dies in the middle of the run, and gets it later")
def test_a_server_that_dies_is_sent_everything_later(
    tmp_path: Path, data_config: DataConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, job, after = train_while_the_server("dies", tmp_path, data_config)
    assert after < 30, "the run waits for its copy no longer than it promises"
    assert job.log.count("W&B ") == 1, "said once"
    assert f"python -m launch.wandb sync {run_dir}" in job.log
    assert len([row for row in rows(run_dir) if "loss" in row]) == 12

    total = len(rows(run_dir))
    with wandb_server() as server:
        for name, value in online(server.url).items():
            monkeypatch.setenv(name, value)
        for options, sent in (([], total), ([], 0), (["--all"], total)):
            end_service()
            assert run_command(main, ["sync", *options, str(run_dir)]) == 0
            assert f"{sent} of {total} rows sent to project evenkeel" in capsys.readouterr().out
            assert_complete(server, run_dir)
        end_service()
        assert list(server.buckets) == [run_id(run_dir)]


def assert_complete(server: WandbServer, run_dir: Path) -> None:
    history = server.history(run_id(run_dir))
    sent = {row["step"]: row["loss"] for row in history if "loss" in row}
    assert sent == {row["step"]: row["loss"] for row in rows(run_dir) if "loss" in row}
    assert {row["step"]: row["eval/loss"] for row in history if "eval/loss" in row} == {
        row["step"]: row["eval/loss"] for row in rows(run_dir) if "eval/loss" in row
    }
    assert any("moe/loads" in row for row in history)
    summary = server.summary(run_id(run_dir))
    assert summary["best/eval_loss"] == min(float(row["eval/loss"]) for row in rows(run_dir) if "eval/loss" in row)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.fault(20, "W&B stalls or fails in the middle of the run")
@pytest.mark.parametrize("mood", ["stalls", "fails"])
def test_a_server_that_misbehaves_does_not_hold_the_run_up(mood: str, tmp_path: Path, data_config: DataConfig) -> None:
    run_dir, job, after = train_while_the_server(mood, tmp_path, data_config)
    assert after < 30
    assert job.log.count("W&B ") == 1
    untouched = tmp_path / "untouched"
    config = tiny_config(untouched, data_config, train={"steps": 12})
    assert run("launch.train", str(config)).returncode == 0
    assert deterministic(run_dir) == deterministic(untouched / "run")


def test_a_long_record_is_sent_row_by_row(
    tmp_path: Path, data_config: DataConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it but the last two steps is there already; the final values are those of the whole run."""
    run_dir = tmp_path / "run"
    tiny_config(run_dir, data_config)
    long_record.write(run_dir / "metrics.jsonl")
    with wandb_server() as server:
        for name, value in online(server.url).items():
            monkeypatch.setenv(name, value)
        end_service()
        other = tmp_path / "other"
        tiny_config(other, data_config)
        (other / "wandb-id").write_text(f"{run_id(run_dir)}\n")
        (other / "metrics.jsonl").write_text(json.dumps({"step": long_record.STEPS - 2, "loss": 1.0}) + "\n")
        assert run_command(main, ["sync", str(other)]) == 0
        end_service()
        with long_record.in_little_memory():
            assert run_command(main, ["sync", str(run_dir)]) == 0
        total = len((run_dir / "metrics.jsonl").read_text().splitlines())
        assert f"3 of {total} rows sent" in capsys.readouterr().out, "two steps and an evaluation"
        summary = server.summary(run_id(run_dir))
        end_service()
    assert (summary["best/eval_loss"], summary["best/step"]) == (2.0, long_record.BEST_STEP)
    assert summary["final/eval_loss"] == long_record.evaluation(long_record.STEPS)["eval/loss"]


def test_what_the_official_command_syncs(tmp_path: Path, data_config: DataConfig) -> None:
    """`wandb sync`, which needs nothing of ours, puts an offline run that was started twice into one."""
    config = tiny_config(tmp_path, data_config, train={"steps": 8}, wandb={"mode": "offline"}, evaluation={"every": 4})
    assert run("launch.train", str(config), "train.steps=4").returncode == 0
    done = run("launch.train", str(config))
    assert done.returncode == 0, done.stderr[-2000:]
    run_dir = tmp_path / "run"
    parts = sorted(map(str, (run_dir / "wandb").glob("offline-run-*")))
    assert len(parts) == 2
    with wandb_server() as server:
        synced = subprocess.run(
            [str(Path(sys.executable).parent / "wandb"), "sync", "--yes", *parts],
            env=environment(**online(server.url)), capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert synced.returncode == 0, synced.stdout + synced.stderr
        assert list(server.buckets) == [run_id(run_dir)]
        steps = [row["step"] for row in server.history(run_id(run_dir)) if "loss" in row]
        assert steps == list(range(1, 9))


@pytest.mark.parametrize(
    ("arguments", "url", "code", "line"),
    [
        (["sync", "FOLDER"], "", 2, "error: WANDB_API_KEY: is not set"),
        (["sync", "FOLDER/none"], "", 2, "error: "),
        (["sync", "FOLDER"], "http://127.0.0.1:9", 6, "error: W&B: cannot open the run of"),
        (["workspace", "CONFIG", "--save"], "http://127.0.0.1:9", 2, "error: wandb.entity: a workspace"),
        (["workspace", "CONFIG", "--out", "/nowhere/at/all.json"], "", 6, "error: --out: /nowhere/at/all.json"),
    ],
)
def test_wrong_use_is_one_line(
    arguments: list[str], url: str, code: int, line: str, tmp_path: Path, data_config: DataConfig,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config, folder = tiny_config(tmp_path, data_config), tmp_path / "run"
    folder.mkdir()
    shutil.copy(config, folder / "config.yaml")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    monkeypatch.setenv("NETRC", "/dev/null")
    for name, value in online(url).items() if url else ():
        monkeypatch.setenv(name, value)
    end_service()
    given = [text.replace("FOLDER", str(folder)).replace("CONFIG", str(config)) for text in arguments]
    assert run_command(main, given) == code
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(line)
    end_service()


def test_the_panels_of_a_project_are_a_file_and_a_view(tmp_path: Path, data_config: DataConfig) -> None:
    config, out = tiny_config(tmp_path, data_config), tmp_path / "panels.json"
    with wandb_server() as server:
        done = run(
            "launch.wandb", "workspace", str(config), f"wandb.entity={ENTITY}", "wandb.group=grid", "--out", str(out),
            "--save", **online(server.url),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        (view,) = server.views
    found = json.loads(out.read_text())
    assert (found["entity"], found["project"]) == (ENTITY, "evenkeel")
    assert (view["entityName"], view["projectName"], view["displayName"]) == (ENTITY, "evenkeel", "Evenkeel")
    sections = found["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]] == [
        section["name"] for section in sections
    ]
    panels = [panel for section in sections for panel in section["panels"]]
    assert {"Run History Line Plot", "Scalar Chart", "Media Browser", "Weave"} <= {
        panel["viewType"] for panel in panels
    }
    assert '"value": "grid"' in out.read_text(), "only the runs of the group"


def test_every_metric_of_a_panel_is_one_that_runs_record(tmp_path: Path, data_config: DataConfig) -> None:
    config = tiny_config(tmp_path, data_config, train={"steps": 4}, evaluation={"every": 4})
    done = run("launch.train", str(config), ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    known = {key for row in rows(tmp_path / "run") for key in row} | {"mfu", "best/eval_loss", "final/maxvio_global"}
    out = tmp_path / "panels.json"
    assert run("launch.wandb", "workspace", str(config), "--out", str(out)).returncode == 0
    for section in json.loads(out.read_text())["spec"]["section"]["panelBankConfig"]["sections"]:
        for panel in section["panels"]:
            options = panel["config"]
            assert set(options.get("metrics", [])) | set(options.get("mediaKeys", [])) <= known, panel
            if regex := options.get("metricRegex"):
                assert any(re.fullmatch(regex, key) for key in known), regex
