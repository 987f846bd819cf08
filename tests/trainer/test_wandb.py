"""The copy in W&B: what offline files and a server really get, and that no server can hurt a run."""

import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import long_record
from tests.wandb_files import config_of, records, values_of
from tests.wandb_server import WandbServer, wandb_server
from trainer.errors import NumericError, StorageError
from trainer.metrics import JsonlLog
from trainer.wandb_alerts import ending
from trainer.wandb_sink import ID_FILE, WandbConfig, WandbSink, end_service, run_id
from trainer.wandb_views import WholeRun

CONFIG = {
    "seed": 1,
    "data": {"path": "/home/me/text", "vocab_size": 8},
    "hooks": {"mine": {"api_key": "feedc0de", "rate": 1}},
}
SHOWN = {"seed": 1, "data": {"vocab_size": 8}, "hooks": {"mine": {"rate": 1}}}
KEY = "0123456789" * 4


@pytest.fixture(autouse=True)
def fresh_service() -> Iterator[None]:
    """W&B reads the environment once in the life of its service."""
    end_service()
    yield
    end_service()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with wandb_server() as server:
        for name, value in online(server.url).items():
            monkeypatch.setenv(name, value)
        yield server


def online(url: str) -> dict[str, str]:
    return {"WANDB_MODE": "online", "WANDB_API_KEY": KEY, "WANDB_BASE_URL": url}


def sink_rows(run_dir: Path, config: WandbConfig, steps: Sequence[int] = (1, 2, 3)) -> float:
    """Copy some rows; returns the seconds the caller spent."""
    begin = time.monotonic()
    sink = WandbSink(config, run_dir=run_dir, run_name="test", resolved_config=CONFIG, domain_names=("prose", "code"))
    for step in steps:
        documents = [{"sample": n, "loss": 1.0, "weight": 9.0 - n, "text": "dear diary"} for n in range(9)]
        row = {
            "step": step, "loss": 1.0 / step, "mfu": None, "moe/layer0/bias": [step / 8, 0.5, None],
            "moe/layer0/domain_loads": [[1, step], [3, None]], "moe/loads": [[1.5, step], [0.25, None]],
            "eval/loss": [9.0, 2.0, 4.0][step - 1], "eval/maxvio_global": step / 10, "reweight/documents": documents,
        }  # fmt: skip
        JsonlLog(run_dir / "metrics.jsonl").append([row])
        sink.log(row)
    spent = time.monotonic() - begin
    sink.close(30)
    return spent


def offline_run(run_dir: Path) -> Path:
    (found,) = (run_dir / "wandb").glob(f"offline-run-*-{run_id(run_dir)}")
    (file,) = found.glob("*.wandb")
    deadline = time.monotonic() + 30
    while not any(record.HasField("exit") for record in records(file)) and time.monotonic() < deadline:
        time.sleep(0.1)  # W&B's own process may still be writing when finish returns
    return found


def test_offline_files_hold_what_was_logged(tmp_path: Path) -> None:
    config = WandbConfig(media_every_s=0, group="grid", tags=("a", "b"), job_type="ablation", table_rows=4)
    assert sink_rows(tmp_path, config) < 1
    folder = offline_run(tmp_path)
    found = records(next(folder.glob("*.wandb")))
    (started,) = [record.run for record in found if record.HasField("run")]
    assert (started.run_id, started.run_group, started.job_type, list(started.tags)) == (
        run_id(tmp_path), "grid", "ablation", ["a", "b"],
    )  # fmt: skip
    assert config_of(started) == SHOWN
    history = [values_of(record.history.item) for record in found if record.HasField("history")]
    assert [row["eval/loss"] for row in history if "eval/loss" in row] == [9.0, 2.0, 4.0]
    summary = {key: value for record in found for key, value in values_of(record.summary.update).items()}
    defined = {record.metric.name: record.metric for record in found if record.HasField("metric")}
    assert defined["eval/loss"].summary.min
    assert defined["eval/loss"].step_metric == "step"
    assert summary["best/eval_loss"] == 2.0
    assert summary["best/step"] == 2
    assert summary["final/maxvio_global"] == pytest.approx(0.3)

    charts = {path: json.loads(path.read_text()) for path in folder.rglob("*.plotly.json")}
    heats = {str(path): data["data"][0] for path, data in charts.items() if data["data"][0]["type"] == "heatmap"}
    assert len(heats) == 6, "two matrices, three steps"
    for path, heat in heats.items():
        assert heat["y"] == (["prose", "code"] if "domain_loads" in path else ["0", "1"])
        assert heat["z"][0][0] == (1 if "domain_loads" in path else 1.5)
        assert heat["z"][1][1] is None
    (course,) = (data["data"] for path, data in charts.items() if "course" in str(path))
    assert [line["y"] for line in course] == [[0.125, 0.25, 0.375], [0.5] * 3, [None] * 3]
    table = json.loads(next(folder.rglob("*.table.json")).read_text())
    assert table["columns"] == ["sample", "loss", "weight"], "no text unless it is asked for"
    assert [line[0] for line in table["data"]] == [0, 1, 7, 8], "the heaviest and the lightest"


def test_nothing_private_is_recorded(tmp_path: Path) -> None:
    sink_rows(tmp_path, WandbConfig())
    folder = offline_run(tmp_path)
    content = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file() and "logs" not in path.parts)
    for private in (
        b"/home/me/text",
        b"feedc0de",
        b"dear diary",
        b"pytest",
        sys.executable.encode(),
    ):
        assert private not in content, private
    assert not [found.environment for found in records(next(folder.glob("*.wandb"))) if found.environment.host]
    assert not [path for path in folder.rglob("*") if path.suffix in {".py", ".patch", ".txt", ".diff"}]


def test_heat_maps_come_seldom_but_the_last_one_comes(tmp_path: Path) -> None:
    sink_rows(tmp_path, WandbConfig(media_every_s=3600))
    heats = [json.loads(path.read_text())["data"][0] for path in offline_run(tmp_path).rglob("*loads*.plotly.json")]
    assert sorted(heat["z"][0][1] for heat in heats) == [1, 1, 3, 3], "of each, the first and the last of three"


def test_a_server_gets_the_run_once_whatever_happens_to_the_job(tmp_path: Path, server: WandbServer) -> None:
    config = WandbConfig(mode="online", media_every_s=3600)
    sink_rows(tmp_path, config, (1, 2))
    name = run_id(tmp_path)
    assert [row["step"] for row in server.history(name) if "loss" in row] == [1, 2]
    assert server.summary(name)["eval/loss"] == {"min": 2.0}
    sink_rows(tmp_path, config, (3,))
    assert (tmp_path / ID_FILE).read_text().strip() == name
    assert list(server.buckets) == [name], "started again, it is the same run"
    assert [row["step"] for row in server.history(name) if "loss" in row] == [1, 2, 3]
    # W&B's own minimum forgets what came before a restart; ours is taken from the record.
    assert server.summary(name)["best/eval_loss"] == 2.0
    assert server.config(name) == SHOWN
    sent = json.dumps([server.buckets, {k: dict(v) for k, v in server.streams.items()}], default=str)
    for private in ("/home/me", "feedc0de", "dear diary", "test_wandb.py"):
        assert private not in sent, private
    assert not any(server.buckets[name].get(key) for key in ("host", "program", "commit", "repo"))
    assert any(path.endswith(".plotly.json") for path in server.files)
    assert any(path.endswith(".table.json") for path in server.files)


def test_alerts_reach_the_server_and_are_rate_limited(tmp_path: Path, server: WandbServer) -> None:
    sink = WandbSink(WandbConfig(mode="online"), run_dir=tmp_path, run_name="test", resolved_config={})
    for step in range(1, 101):
        is_spike = step in (80, 90)
        row = {"loss": 9.0 if is_spike else 2.0, "loss/ema": 2.0, "step/spike": int(is_spike), "moe/dead_experts": 2}
        sink.log({"step": step, **row})
    sink.alert("slow rank", "rank 3 (node-b)")
    sink.close(30, error=NumericError("balance certificate, step 7: a bias is not float32"))
    found = {(alert["title"], alert["severity"]): alert["text"] for alert in server.alerts}
    assert found[("loss spike", "WARN")] == "step 80: loss 9.0000, lately 2.0000"
    assert found[("dead experts", "WARN")] == "step 30: 2 experts without a token; 30 steps now"
    assert found[("slow rank", "WARN")] == "rank 3 (node-b)"
    assert found[("balance certificate failed", "ERROR")].endswith("a bias is not float32")
    assert len(server.alerts) == len(found) == 4, "the second spike, and later reports of dead experts, are held back"


def test_only_numbers_are_told_of_an_error() -> None:
    assert ending(StorageError("/secret/path: no space left"))[1] == "StorageError: log.txt says more"
    assert ending(NumericError("step 9: 10 steps in a row were skipped"))[:2] == (
        "run failed", "NumericError: step 9: 10 steps in a row were skipped",
    )  # fmt: skip


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "W&B" in record.getMessage()]


def test_a_server_that_refuses_costs_training_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in online("http://127.0.0.1:9").items():
        monkeypatch.setenv(name, value)
    logging.getLogger("evenkeel").propagate = True
    with caplog.at_level(logging.WARNING, logger="evenkeel"):
        assert sink_rows(tmp_path, WandbConfig(mode="online")) < 1
    (warning,) = messages(caplog)
    assert "training goes on" in warning
    assert KEY not in warning
    assert offline_run(tmp_path), "the copy is kept for later"


def test_rows_that_find_no_place_are_counted_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, server: WandbServer
) -> None:
    monkeypatch.setattr("trainer.wandb_sink._QUEUE_ROWS", 5)
    server.mood = "stalling"
    logging.getLogger("evenkeel").propagate = True
    with caplog.at_level(logging.WARNING, logger="evenkeel"):
        sink = WandbSink(WandbConfig(mode="online"), run_dir=tmp_path, run_name="test", resolved_config={})
        begin = time.monotonic()
        for step in range(50):
            sink.log({"step": step, "loss": 1.0})
        assert time.monotonic() - begin < 0.5
        sink.close(0.5)
    (warning,) = messages(caplog)
    assert "was too slow: 50 rows are missing there" in warning, "45 had no place, 5 never left it"


def test_disabled_starts_nothing(tmp_path: Path) -> None:
    sink_rows(tmp_path, WandbConfig(mode="disabled"))
    assert not (tmp_path / "wandb").exists()
    assert not (tmp_path / ID_FILE).exists()


def test_the_end_of_a_long_run_is_soon_told_and_takes_little_memory(tmp_path: Path) -> None:
    """Started again near its end: what earlier starts have recorded is in the final values all the same."""
    path = tmp_path / "metrics.jsonl"
    assert long_record.write(path) > 20 << 20
    config = WandbConfig(mode="offline", system_metrics=False)
    with long_record.in_little_memory():
        sink = WandbSink(config, run_dir=tmp_path, run_name="test", resolved_config={})
        for step in (long_record.STEPS + 1, long_record.STEPS + 2):
            row = {"step": step, "loss": 2.0}
            JsonlLog(path).append([row])
            sink.log(row)
        sink.close(30)
    folder = offline_run(tmp_path)
    found = records(next(folder.glob("*.wandb")))
    summary = {key: value for record in found for key, value in values_of(record.summary.update).items()}
    assert (summary["best/eval_loss"], summary["best/step"]) == (2.0, long_record.BEST_STEP)
    assert summary["final/eval_loss"] == long_record.evaluation(long_record.STEPS)["eval/loss"]
    assert summary["final/maxvio_global"] == 0.5
    history = [values_of(record.history.item) for record in found if record.HasField("history")]
    assert max(int(row["step"]) for row in history if "step" in row) == history[-1]["step"] == long_record.STEPS + 2
    courses = [json.loads(path.read_text())["data"] for path in folder.rglob("*.plotly.json") if "course" in str(path)]
    assert len(courses) == 3
    for course in courses:
        assert course[0]["x"] == list(range(long_record.EVERY, long_record.STEPS + 1, long_record.EVERY))
        assert course[7]["y"] == [step + 1 for step in course[0]["x"]]


def test_rows_that_were_dropped_are_in_the_final_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: WandbServer
) -> None:
    monkeypatch.setattr("trainer.wandb_sink._QUEUE_ROWS", 1)
    sink = WandbSink(WandbConfig(mode="online"), run_dir=tmp_path, run_name="test", resolved_config={})
    for step in range(1, 51):
        row = {"step": step, "eval/loss": abs(step - 40.0)}
        JsonlLog(tmp_path / "metrics.jsonl").append([row])
        sink.log(row)
    sink.close(30)
    assert server.summary(run_id(tmp_path))["best/step"] == 40
    assert server.summary(run_id(tmp_path))["final/eval_loss"] == 10


def test_what_is_said_of_a_whole_run_is_what_its_rows_hold() -> None:
    rows: list[dict[str, Any]] = [
        {"step": 0, "eval/loss": 5.0, "eval/maxvio_global": 2.0, "bias": [0.0, None], "loads": [[1.0]]},
        {"step": 1, "loss": 4.0, "reweight/samples/loss": [1.0, 2.0], "mine": [7]},
        {"step": 2, "loss": 3.0, "empty": [], "mine": [8]},
        {"step": 2, "eval/loss": 3.0, "eval/maxvio_global": 1.0, "bias": [0.5, 1.0], "reweight/documents": [{"a": 1}]},
        {"step": 4, "eval/loss": 3.0, "eval/maxvio_global": None, "bias": [0.25, 0.5]},
        {"step": 5, "loss": 1.0},
    ]
    parsed, lines = WholeRun(), WholeRun()
    assert (parsed.step, parsed.summary()) == (None, {})
    for row in rows:
        parsed.add(row)
        lines.add_line(json.dumps(row))
    lines.add_line('{"step": 6, "bias": [0.')
    for whole in (parsed, lines):
        assert whole.step == 5
        assert whole.summary() == {"best/eval_loss": 3.0, "best/step": 2, "final/eval_loss": 3.0}
        charts = {key: figure.data for key, figure in whole.courses(SimpleNamespace(Plotly=lambda each: each)).items()}
        assert list(charts) == ["bias/course", "mine/course"]
        assert [(line.x, line.y) for line in charts["bias/course"]] == [
            ((0, 2, 4), (0.0, 0.5, 0.25)), ((0, 2, 4), (None, 1.0, 0.5)),
        ]  # fmt: skip
        assert [(line.x, line.y) for line in charts["mine/course"]] == [((1, 2), (7, 8))]


def test_courses_stay_small_and_end_where_the_run_does() -> None:
    whole = WholeRun()
    for step in range(10_000):
        whole.add({"step": step, "bias": [step]})
    (figure,) = whole.courses(SimpleNamespace(Plotly=lambda each: each)).values()
    assert 30 <= len(figure.data[0].x) <= 61
    assert (figure.data[0].x[0], figure.data[0].x[-1]) == (0, 9999)
