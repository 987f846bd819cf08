"""The figures are drawn from the committed files and from files of launch.profile; wrong input is one line."""

import json
import struct
from itertools import pairwise
from pathlib import Path

import pytest

from tests.bench import figures
from tests.bench.breakdown_figure import boxes, breakdown_figure, part_ms, take_profiles, total_ms
from tests.bench.growth_figure import growth_figure
from tests.bench.growth_fit import Curve
from tests.browser import CHROMIUM

SECONDS = {
    "data": 0.01, "forward": 0.2, "forward/head": 0.15, "forward/attention": 0.05, "losses": 0.01, "hooks": 0.0,
    "backward": 0.3, "backward/attention": 0.2, "backward/reduce": 0.1, "optimizer": 0.02, "other": 0.01,
    "between steps": 0.01,
}  # fmt: skip


def profile(path: Path, **more: object) -> Path:
    facts = {"title": "a step: 1 x CPU", "torch": "2.13", "steps": 4, "tokens_per_s": 10.0, "seconds": SECONDS}
    path.write_text(json.dumps(facts | more | {"operations": {"forward/head": {"aten::mm": 0.1}}}))
    return path


def test_a_breakdown_adds_up_and_keeps_its_order(tmp_path: Path) -> None:
    take_profiles([f"before={profile(tmp_path / 'a.json')}"], tmp_path / "out" / "breakdown.json")
    found = json.loads((tmp_path / "out" / "breakdown.json").read_text())["profiles"][0]
    assert found["label"] == "before"
    assert "operations" not in found, "too many for a file in the repository"
    assert total_ms(found) == pytest.approx(560)
    assert part_ms(found) == pytest.approx({"attention": 250, "head": 150, "reduce": 100})
    assert next(iter(part_ms(found))) == "attention", "the longest first"
    phases, parts = boxes(found)
    for level in (phases, parts):
        assert sum(box.length for box in level) == pytest.approx(560)
        assert all(a.start + a.length == pytest.approx(b.start) for a, b in pairwise(level))
    assert [box.name for box in parts[:4]] == ["data", "head", "attention", "losses"]


def test_titles_say_what_was_found() -> None:
    flat, steep = Curve((1, 2, 4), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)), Curve((1, 2, 4), (1.0, 2.0, 4.0), (1.0, 1.0, 1.0))
    facts = {"hardware": "a", "versions": {"torch": "2"}}
    assert "no faster than theory along all 1" in growth_figure(facts, {"layers": flat}).layout.title.text
    assert "1 of 2 axes: ranks" in growth_figure(facts, {"layers": flat, "ranks": steep}).layout.title.text
    states = [
        {"label": label, "title": "a step", "torch": "2", "steps": 1, "seconds": SECONDS | changed}
        for label, changed in (("before", {"backward": 0.4, "backward/attention": 0.3}), ("after", {}))
    ]
    title = breakdown_figure({"hardware": "a", "profiles": states}).layout.title.text
    assert "Attention and head take 71% of a step" in title
    assert "attention 45%, before 53%" in title


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
def test_the_command_draws_from_the_committed_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    assert figures.main(["--images", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in ("growth.png", "breakdown.png")]
    for name in ("growth", "breakdown"):
        image = (tmp_path / f"{name}.png").read_bytes()
        assert image.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", image[16:24])
        assert width == round(1040 * figures.SCALE)
        assert height > 600
        assert 20_000 < len(image) < 150_000, "drawn, and small enough for a repository"
        committed = figures.BENCH / "images" / f"{name}.png"
        assert struct.unpack(">II", committed.read_bytes()[16:24]) == (width, height), "the image is of these files"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--results", "nowhere"], "nowhere/growth.json"),
        (["--breakdown", "nofile"], "wants LABEL=FILE"),
        (["--breakdown", "a=growth.json"], "wants LABEL=FILE"),
        (["--breakdown", "a=missing.json"], "missing.json"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "CHROMIUM", "/bin/false")
    Path("growth.json").write_text("{}")
    assert figures.main([*arguments, "--images", str(tmp_path / "images")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert complaint in error[0]


def test_without_a_browser_the_line_says_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(figures, "CHROMIUM", None)
    assert figures.main([]) == 2
    assert "apt-get install chromium" in capsys.readouterr().err
