"""What `launch.prepare` shows while it works."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from launch import prepare as command_module
from launch._cli import run_command
from tests.harness import losses, run, tiny_config
from trainer.data.config import DataConfig
from trainer.data.prepare import Status


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(command_module, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    file = io.StringIO()
    with command_module._shown(Console(file=file, force_terminal=is_terminal, width=100)) as view:
        view.show(Status("training the tokenizer"))
        for done in (0, 25, 50, 75, 100):
            view.show(Status("tokenizing", done, 100, done * 1_000_000, done * 250_000))
        view.show(Status("looking for copies"))
    shown = file.getvalue()
    assert "tokenizing" in shown
    assert ("\x1b[" in shown) == is_terminal
    if not is_terminal:
        assert shown.splitlines() == [
            "training the tokenizer ...",
            "tokenizing ...",
            "tokenizing 50% at 4.2 MB/s, 1.04 M tokens/s ...",
            "tokenizing 100% at 4.2 MB/s, 1.04 M tokens/s ...",
            "looking for copies ...",
        ]
    assert view.throughput(2) == "; tokenized 100.0 MB to 25.00 M tokens at 4.2 MB/s, 1.04 M tokens/s with 2 workers"
    assert command_module._View(Console(file=file), None).throughput(2) == ""


def test_what_was_dropped_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "notes.jsonl"
    texts = [f"note {number % 30} of some length" for number in range(40)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, "", None]))
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"data": {"path": str(tmp_path / "out"), "source": str(source), "vocab_size": 270}}))
    arguments = [str(config), "data.on_bad_document=skip", "--workers", "1"]
    for last in ("prepared in ", "already prepared: "):
        assert run_command(command_module.main, arguments) == 0
        shown = capsys.readouterr().out
        _, dropped = ([cell.strip() for cell in line.split("│")] for line in shown.splitlines() if "│ notes" in line)
        assert dropped == ["", "notes", "1", "10", "1", ""], "bad, copies, empty"
        assert f"skipped: {source}: row 42: field 'text' holds NoneType, not text" in shown
        assert last in shown
    assert run_command(command_module.main, [str(config), "--workers", "1"]) == 2
    assert "on_bad_document: skip -> stop" in capsys.readouterr().err


def test_a_text_of_one_document_trains_and_says_that_nothing_is_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "book.txt"
    source.write_text(" ".join(f"word{number % 97} and {number}" for number in range(4000)))
    data = DataConfig(path=str(tmp_path / "out"), source=str(source), vocab_size=280)
    config = tiny_config(tmp_path, data, train={"steps": 3})
    assert run_command(command_module.main, [str(config), "--workers", "1"]) == 0
    assert "warning: no document is held out; split the text" in capsys.readouterr().out
    done = run("launch.train", str(config))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("no document is held out") == 1
    assert "nan" not in done.stderr + done.stdout
    assert len(losses(tmp_path / "run")) == 3
    evaluated = run("launch.evaluate", str(tmp_path / "run"))
    assert evaluated.returncode == 2
    assert "no document is held out, so there is nothing to evaluate on" in evaluated.stderr
