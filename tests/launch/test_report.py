"""The report of a real run shows what was recorded, in one file that needs nothing else."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import evaluate, report, theory
from launch._cli import run_command
from launch.report_sections._parts import MAX_POINTS, RunRecord, evenly, line
from launch.report_sections.balance import balance
from moe.score_sample import load_scores
from tests.harness import rows, run, tiny_config
from trainer.data.config import DataConfig


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


def figures(page: str) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Data and layout of every chart on the page."""
    decoder, found = json.JSONDecoder(), []
    for match in re.finditer(r'Plotly\.newPlot\(\s*"c\d+-\d+",\s*', page):
        data, end = decoder.raw_decode(page, match.end())
        layout, _ = decoder.raw_decode(page, re.compile(r"\s*,\s*").match(page, end).end())  # type: ignore[union-attr]
        found.append((data, layout))
    return found


def test_training_leaves_a_page_that_needs_no_network(trained: Path) -> None:
    page = (trained / "report.html").read_text()
    outside = page[: page.index("<script>")] + page[page.index("</script>") :]  # without the library's own text
    assert not re.search(r'(src|href)\s*=\s*["\'](?!#)', outside), "everything is in the file"
    assert not re.search(r"<link|@import|url\(", outside)
    titles = re.findall("<h3>(.*?)</h3>", page)
    assert titles == [
        "MaxVio", "Held-out load of each expert", "Selection biases", "Experts and domains, step 12", "Duality gap",
        "Sharpness", "Losses and weights of a step", "Weight against loss", "Domains", "Most and least weighted",
    ]  # fmt: skip
    assert len(figures(page)) == len(titles)
    assert "Balance certificate: 4 of 4 evaluations" in page


def test_charts_hold_what_was_recorded(trained: Path) -> None:
    (violations, _), (loads, loads_layout), (biases, menu), (domains, _), (gaps, _) = figures(
        (trained / "report.html").read_text()
    )[:5]
    recorded = rows(trained)
    evaluations = [row for row in recorded if "eval/loss" in row]
    steps = [row for row in recorded if "loss" in row]
    by_name = {trace["name"]: trace for trace in violations}
    for layer in range(3):
        assert by_name[f"layer {layer}"]["y"] == [row[f"moe/layer{layer}/maxvio"] for row in steps]
    assert by_name["held-out, mean"]["y"] == [row["eval/maxvio_global"] for row in evaluations]
    assert loads[0]["z"] == evaluations[-1]["moe/loads"]
    assert [step["label"] for step in loads_layout["sliders"][0]["steps"]] == ["0", "4", "8", "12"]
    assert len(biases) == 8 + 16 + 8
    assert biases[8 + 3]["y"] == [row["moe/layer1/bias"][3] for row in evaluations]  # type: ignore[index]
    buttons = menu["updatemenus"][0]["buttons"]
    assert [button["label"] for button in buttons] == ["layer 0", "layer 1", "layer 2"]
    assert buttons[1]["args"][0]["visible"] == [False] * 8 + [True] * 16 + [False] * 8
    assert [trace.get("visible", True) for trace in biases] == [True] * 8 + [False] * 24
    assert len(domains) == 2, "the next-token block has no held-out loads"
    assert domains[0]["y"] == ["code", "prose", "table"]
    code = evaluations[-1]["moe/layer0/domain_loads"][0]  # type: ignore[index]
    assert domains[0]["z"][0] == pytest.approx([load * 8 / sum(code) for load in code])
    assert {trace["name"]: trace["y"] for trace in gaps}["mean"] == [row["moe/duality_gap"] for row in evaluations]


def test_evaluations_record_balance(trained: Path) -> None:
    for row in rows(trained):
        if "eval/loss" in row:
            assert row["moe/duality_gap"] >= 0  # type: ignore[operator]
            assert row["moe/layer2/duality_gap"] is None
            assert row["moe/certificate"] == 1
            assert [len(line) for line in row["moe/loads"]] == [16] * 3  # type: ignore[attr-defined]


def test_the_command_takes_several_runs(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = tmp_path / "<dense>"
    dense.mkdir()
    (dense / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    (other / "report.html").unlink()
    assert run_command(report.main, [str(other), str(dense)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(other / "report.html"), str(dense / "report.html")]
    assert figures((other / "report.html").read_text()) == figures((trained / "report.html").read_text())
    page = (dense / "report.html").read_text()
    assert "&lt;dense&gt;" in page
    assert "recorded nothing that a section shows" in page
    (dense / "metrics.jsonl").write_text("")
    assert run_command(report.main, [str(dense)]) == 2
    assert "metrics.jsonl is empty" in capsys.readouterr().err
    assert run_command(report.main, [str(tmp_path / "nowhere")]) == 2


def test_a_run_stopped_before_its_first_step_is_drawn_too(trained: Path) -> None:
    start = [row for row in rows(trained) if row["step"] == 0]
    section = balance(RunRecord("start", start))
    assert section is not None
    assert list(section.charts[3].figure.data[0].y) == ["domain 0", "domain 1", "domain 2"]


def test_long_runs_are_thinned() -> None:
    table = [{"step": n, "a": float(n), "b": None} for n in range(1, 3501)]
    x, y = line(table, "a")
    assert len(x) == len(y) == 875 <= MAX_POINTS
    assert (x[0], y[0], x[-1]) == (4, 2.5, 3500)
    assert line(table, "b") == line([], "a") == ([], [])
    assert [row["step"] for row in evenly(table, 3)] == [1, 1751, 3500]


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
