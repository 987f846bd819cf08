"""The report of a real run shows what was recorded, in one file that needs nothing else."""

import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch import evaluate, report, theory, watch
from launch._cli import run_command
from launch.report_sections._log import event_of
from launch.report_sections._parts import MAX_POINTS, digits, evenly, means, thin
from launch.report_sections._record import RunRecord
from launch.report_sections.events import events_of
from moe.score_sample import load_scores
from tests.harness import ROOT, rows, run, tiny_config
from tests.launch.run_folders import evaluation, links_out, training_rows, write_grid, write_run
from trainer.data.config import DataConfig
from trainer.metrics import EvenRows


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data_config: DataConfig) -> Path:
    """A run whose layers differ, with a block that only trains."""
    folder = tmp_path_factory.mktemp("report")
    config = tiny_config(
        folder, data_config,
        model={"num_layers": 4, "layer_experts": [0, 8, 0, 16], "mtp_weight": 0.3},
        evaluation={"every": 4, "max_rows": 8}, checkpoint={"every": 0},
    )  # fmt: skip
    done = run("launch.train", str(config))
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "run"


def page_data(page: str) -> dict[str, Any]:
    """Everything that the page draws."""
    match = re.search(r'<script type="application/json" id="page-data">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    found: dict[str, Any] = json.loads(match[1])
    return found


def charts(page: str) -> dict[str, dict[str, Any]]:
    """Figures of a page by title."""
    return {figure["title"]: figure for figure in page_data(page)["figures"]}


def traces(figure: dict[str, Any], view: int = 0) -> dict[str, dict[str, Any]]:
    """Traces of a view by name."""
    return {trace["name"]: trace for trace in figure["views"][view]["traces"]}


def sections(page: str) -> list[str]:
    return re.findall(r'<section id="([\w-]+)"', page)


def draw(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the command and return the page."""
    assert run_command(report.main, list(map(str, arguments))) == 0
    return Path(capsys.readouterr().out.splitlines()[0]).read_text()


def test_training_leaves_a_page_that_needs_no_network(trained: Path) -> None:
    page = (trained / "report.html").read_text()
    assert page.count("plotly.js v") == 1, "the library is there once"
    assert links_out(page) == [], "everything is in the file"
    anchors = sections(page)
    assert anchors == [
        "overview", "loss", "domains", "expert-balance", "sample-weights", "speed-and-memory",
        "events", "configuration",
    ]  # fmt: skip
    assert re.findall(r'<a href="#([\w-]+)">', page.split("</nav>")[0]) == anchors
    assert list(charts(page)) == [
        "Training loss", "Held-out perplexity by domain", "Gradient norm", "Learning rate", "Domains over time",
        "MaxVio", "Held-out load of each expert", "Selection biases", "Experts and domains", "Evenness", "Duality gap",
        "Effective sample size", "Temperature", "Losses of a step", "Weights of a step", "Weight against loss",
        "Throughput", "Time of a step", "Memory",
    ]  # fmt: skip
    assert "Balance certificate: 4 of 4 evaluations" in page
    assert "Finished: step 12 of 12" in page


def test_charts_hold_what_was_recorded(trained: Path) -> None:
    page = (trained / "report.html").read_text()
    drawn, recorded = charts(page), rows(trained)
    evaluations: list[dict[str, Any]] = [row for row in recorded if "eval/loss" in row]
    steps: list[dict[str, Any]] = [row for row in recorded if "loss" in row]

    losses = traces(drawn["Training loss"])
    assert losses["each step"]["y"] == digits([row["loss"] for row in steps])
    assert losses["held-out"]["y"] == digits([row["eval/loss"] for row in evaluations])
    violations = traces(drawn["MaxVio"])
    for layer in range(3):
        assert violations[f"layer {layer}"]["y"] == digits([row[f"moe/layer{layer}/maxvio"] for row in steps])
    assert violations["held-out"]["y"] == digits([row["eval/maxvio_global"] for row in evaluations])

    frames = drawn["Held-out load of each expert"]["views"][0]["frames"]
    assert [frame["label"] for frame in frames] == ["0", "4", "8", "12"]
    last: list[list[float | None]] = evaluations[-1]["moe/loads"]
    assert frames[-1]["traces"][0]["z"] == [digits(loads, 4) for loads in last]

    biases = drawn["Selection biases"]["views"]
    assert [view["labels"] for view in biases] == [["layer 0"], ["layer 1"], ["layer 2"]]
    assert [len(view["traces"]) for view in biases] == [8, 16, 8]
    course = traces(drawn["Selection biases"], 1)["expert 3"]
    assert course["y"] == digits([row["moe/layer1/bias"][3] for row in evaluations], 4)
    named = [trace["name"] for trace in biases[1]["traces"] if trace["showlegend"]]
    ends = evaluations[-1]["moe/layer1/bias"]
    assert sorted(named) == sorted({f"expert {np.argmax(ends)}", f"expert {np.argmin(ends)}"})

    maps = drawn["Experts and domains"]["views"]
    assert [view["labels"] for view in maps] == [["layer 0"], ["layer 1"]], "the next-token block has no held-out loads"
    cells = maps[0]["frames"][-1]["traces"][0]
    assert cells["y"] == ["code", "prose", "table"]
    code = evaluations[-1]["moe/layer0/domain_loads"][0]
    assert cells["z"][0] == pytest.approx([load * 8 / sum(code) for load in code], rel=1e-3)

    ess = traces(drawn["Effective sample size"])["effective sample size / B"]
    assert ess["y"] == digits([row["reweight/ess"] for row in steps])
    histogram = drawn["Losses of a step"]["views"][0]["frames"][-1]
    sampled = [row for row in steps if "reweight/samples/loss" in row][-1]
    assert histogram["label"] == str(sampled["step"])
    assert sum(histogram["traces"][0]["y"]) == len(sampled["reweight/samples/loss"])
    axes = page_data(page)["runs"][0]
    assert axes["step"] == list(range(13))
    assert axes["tokens"] == [0, *(row["tokens"] for row in steps)]


def test_evaluations_record_balance(trained: Path) -> None:
    for row in rows(trained):
        if "eval/loss" in row:
            assert row["moe/duality_gap"] >= 0  # type: ignore[operator]
            assert row["moe/layer2/duality_gap"] is None
            assert row["moe/certificate"] == 1
            assert [len(line) for line in row["moe/loads"]] == [16] * 3  # type: ignore[attr-defined]


def test_several_runs_make_one_page(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = write_run(tmp_path / "<dense>", training_rows(6), steps=8, seed=5)
    out = tmp_path / "both.html"
    page = draw(capsys, trained, dense, "--out", out)
    assert out.read_text() == page
    assert "&lt;dense&gt;" in page
    assert "<dense>" not in page
    assert set(traces(charts(page)["Training loss"])) == {"run", "<dense>"}
    labels = [view["labels"] for view in charts(page)["MaxVio"]["views"]]
    assert labels == [["held-out, all runs", "mean"], ["training batches, all runs", "mean"], ["run", "by layer"]]
    differs = page[page.index("What differs") :].split("<summary>")[0]
    assert "train.steps" in differs
    assert "run_dir</th>" not in differs
    assert "1 finished, 1 stopped early" in page
    # Two runs of one name are told apart by the folder above.
    twin = write_run(tmp_path / "other" / "<dense>", training_rows(6))
    names = set(traces(charts(draw(capsys, dense, twin, "--out", out))["Training loss"]))
    assert names == {f"{tmp_path.name}/<dense>", "other/<dense>"}


def test_wrong_arguments_end_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = write_run(tmp_path / "empty", [], end="")
    good = write_run(tmp_path / "good", training_rows(3))
    for arguments, message in [
        ([empty], "metrics.jsonl is empty"),
        ([tmp_path / "nowhere"], "No such file"),
        ([good, good], "a run is named twice"),
    ]:
        assert run_command(report.main, list(map(str, arguments))) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    (tmp_path / "file").write_text("")
    assert run_command(report.main, [str(good), "--out", str(tmp_path / "file" / "x.html")]) == 6
    assert "choose another --out" in capsys.readouterr().err


def test_sparse_runs_get_a_sensible_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = draw(capsys, write_run(tmp_path / "bare", [{"step": 1, "loss": 2.0}]))
    assert sections(bare) == ["overview", "loss", "events"]
    assert ">2.000<" in bare
    no_hook = draw(
        capsys, write_run(tmp_path / "hookless", [evaluation(0, 8.0), *training_rows(9), evaluation(9, 4.0)], steps=9)
    )
    assert sections(no_hook) == [
        "overview", "loss", "domains", "speed-and-memory", "events", "configuration",
    ]  # fmt: skip
    only_start = draw(capsys, write_run(tmp_path / "start", [evaluation(0, 8.0, maxvio=0.4)], steps=9))
    assert "Stopped early: step 0 of 9" in only_start
    cells = charts(only_start)["Experts and domains"]["views"][0]["frames"][0]["traces"][0]
    assert cells["y"] == ["domain 0", "domain 1"], "no training row has named them"
    unevaluated = draw(capsys, write_run(tmp_path / "unevaluated", training_rows(9), steps=9))
    assert "held-out loss" not in unevaluated[unevaluated.index("tiles") : unevaluated.index('id="loss"')]


def test_a_crash_and_what_followed_are_events(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = training_rows(200)
    for step in (50, 51):
        table[step - 1]["step/applied"] = 0
        table[step - 1]["grad_norm"] = None
    table[149]["loss"] += 5.0
    log = (
        "10:00:00 INFO [0] step 1: data phase 0, from sample 0: code 50.0% (data.weights)\n"
        "10:00:01 WARNING [0] step 50 skipped: loss is not finite (samples 392 to 399); nothing was changed\n"
        "10:00:02 WARNING [0] checkpoint rejected: step-00000090: hash\n"
        "10:00:02 INFO [0] resumed from step 80\n"
        "10:00:03 INFO [0] step 150/400 loss 7.0 lr 1e-3\n"
    )
    folder = write_run(tmp_path / "crashed", table, steps=400, log=log, end='\n{"step": 201, "loss": 3.')
    record = RunRecord.read(folder)
    found = [(event.kind, event.step) for event in events_of(record)]
    assert found == [
        ("phase", 1), ("warning", None), ("skipped", 50), ("resume", 80), ("spike", 150), ("warning", None)
    ]  # fmt: skip
    page = draw(capsys, folder)
    assert "loss is not finite" in page
    assert "2 steps, to 51" in page
    assert "1 line(s) of metrics.jsonl were cut short" in page
    assert "Stopped early: step 200 of 400" in page
    marks = traces(charts(page)["Training loss"])["events"]
    assert marks["x"] == [50, 80, 150]


def test_a_run_that_flags_its_spikes_is_believed(tmp_path: Path) -> None:
    table = training_rows(200)
    for row in table:
        row["step/spike"] = int(row["step"] in (120, 121))
    table[149]["loss"] += 5.0
    log = (
        "10:00:00 WARNING [0] step 120: loss 3.0000 is a spike\n"
        "10:00:01 WARNING [0] step 121: 2 spikes in a row; weights went back to step 80 (rewind 1 of 3)\n"
    )
    found = events_of(RunRecord.read(write_run(tmp_path / "run", table, log=log)))
    assert [(event.kind, event.step) for event in found] == [("spike", 120), ("rewind", 121)]


def test_the_time_of_a_step_is_divided_as_far_as_it_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = training_rows(40)
    for row in table:
        row |= {"time/forward_s": 0.05, "time/backward_s": 0.03}
        if row["step"] > 20:
            row |= {"time/forward/experts_s": 0.02, "time/forward/engine_s": 0.03}
    figure = charts(draw(capsys, write_run(tmp_path / "run", table)))["Time of a step"]
    assert [view["labels"] for view in figure["views"]] == [["phases"], ["their parts"]]
    phases, parts = traces(figure), traces(figure, 1)
    assert list(phases) == ["data", "forward", "backward", "rest of the step"]
    assert phases["rest of the step"]["y"] == pytest.approx([0.01] * 40)
    assert list(parts) == ["data", "backward", "forward/experts", "forward/engine", "rest of the step"]
    assert parts["forward/experts"]["y"] == [0.0] * 20 + [0.02] * 20
    assert parts["rest of the step"]["y"][-1] == pytest.approx(0.01)


def test_lines_of_the_log() -> None:
    assert event_of("10:00:00 INFO [0] step 3/9 loss 1.0") is None
    assert event_of("Traceback (most recent call last):") is None
    event = event_of("10:00:00 DEBUG [0] the run ended with an error")
    assert event is not None
    assert (event.kind, event.clock) == ("error", "10:00:00")


def test_long_runs_are_thinned() -> None:
    x, y, low, high = thin(np.arange(1.0, 3501), np.arange(1.0, 3501))
    assert len(x) == len(y) == 875 <= MAX_POINTS
    assert (x[0], y[0], low[0], high[0], x[-1]) == (4, 2.5, 1, 4, 3500)
    assert evenly(range(3500), 3) == [0, 1750, 3499]
    kept = EvenRows(at_least=10)
    for n in range(10_000):
        kept.add({"step": n})
    steps = [row["step"] for row in kept.rows()]
    assert 10 <= len(steps) <= 21
    assert (steps[0], steps[-1]) == (0, 9999)
    assert len(set(np.diff(steps[:-1]))) == 1


def test_means_leave_out_steps_without_a_value() -> None:
    record = RunRecord("r")
    for step, value in enumerate([1.0, None, 3.0, None, None, None], start=1):
        record.add({"step": step, "loss": 1.0, "domain/a/loss": value})
    x, y = means(record.steps, "domain/a/loss", 3)
    assert (x.tolist(), y.tolist()) == ([2, 4], [1, 3])


def test_a_run_of_many_steps_is_drawn_in_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "long"
    folder.mkdir()
    line = '{"step": %d, "loss": %f, "tokens": %d, "time/step_s": 0.5, "tokens_per_s": 8e3, "step/applied": 1}\n'
    with (folder / "metrics.jsonl").open("w") as file:
        file.writelines(line % (n, 2 + 9 / n, 4096 * n) for n in range(1, 100_001))
    began = time.monotonic()
    page = draw(capsys, folder)
    assert time.monotonic() - began < 30, "seconds, also on a busy machine"
    assert len(page) < 6_000_000
    assert (
        max(len(t["x"]) for figure in charts(page).values() for v in figure["views"] for t in v["traces"]) <= MAX_POINTS
    )
    band = traces(charts(page)["Training loss"])
    assert band["largest"]["y"][0] == 11.0, "what a mean hides is in the band"


def test_numbers_are_written_as_csv(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "r.html"), "--csv", str(tmp_path / "csv")]
    assert run_command(report.main, [str(trained), *out]) == 0
    assert [Path(line).name for line in capsys.readouterr().out.splitlines()] == [
        "r.html", "run-steps.csv", "run-evaluations.csv"
    ]  # fmt: skip
    head, *lines = (tmp_path / "csv" / "run-steps.csv").read_text().splitlines()
    column = head.split(",").index("loss")
    assert [float(line.split(",")[column]) for line in lines] == [row["loss"] for row in rows(trained) if "loss" in row]


def test_commands_of_the_page_that_explains_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = re.findall(r"python -m launch\.(report|watch) ([^#`\n]*)", (ROOT / "launch" / "REPORT.md").read_text())
    assert len(found) >= 6
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "a", "b"):
        write_run(Path("runs") / name, [*training_rows(5), evaluation(5, 3.0)], steps=5)
    write_grid(Path("runs") / "my-grid", {"a": [4.0, 4.1], "b": [3.0, 3.2]})
    for command, arguments in found:
        main = {"report": report.main, "watch": watch.main}[command]
        assert run_command(main, arguments.split()) == 0, arguments
    assert {path.name for path in tmp_path.rglob("*.html")} == {"report.html", "compared.html"}


def test_scores_are_recorded_alike_by_any_number_of_ranks(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for ranks, file in enumerate(files):
        done = run(
            "launch.evaluate", str(trained), "--max-rows", "9", "--tokens", "64", "--record-scores", str(file),
            ranks=2 * ranks,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert "nan" not in done.stdout, "the next-token block does not spoil the mean"
    one, two = map(load_scores, files)
    assert one.top_k == two.top_k == 2
    assert one.layers.keys() == two.layers.keys() == {0, 1}
    for layer, experts in ((0, 8), (1, 16)):
        assert one.layers[layer].shape == (64, experts)
        torch.testing.assert_close(one.layers[layer], two.layers[layer], rtol=1e-5, atol=1e-6)
    arguments = ["--scores", str(files[0]), "--layer", "1", "--steps", "20", "--out", str(tmp_path / "drawn")]
    assert run_command(theory.main, arguments) == 0
    assert "layer 1 of one.safetensors" in capsys.readouterr().out
    assert run_command(evaluate.main, [str(trained), "--tokens", "0"]) == 2
    assert "--tokens: 0 must be at least 1" in capsys.readouterr().err
