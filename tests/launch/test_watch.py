"""launch.watch prints what files say, and follows them in a real terminal while they change."""

import errno
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import watch
from launch._cli import run_command
from launch._watch_run import RunView, clock, sparkline
from launch.report_sections._record import in_use
from tests import long_record
from tests.harness import ROOT, command, environment
from tests.launch.run_folders import evaluation, training_rows, write_grid, write_run
from trainer.line_tail import LineTail


def once(capsys: pytest.CaptureFixture[str], folder: Path, width: int = 110) -> str:
    os.environ["COLUMNS"] = str(width)
    try:
        assert run_command(watch.main, ["--once", str(folder)]) == 0
    finally:
        del os.environ["COLUMNS"]
    return capsys.readouterr().out


def test_a_run_at_a_glance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = training_rows(30)
    table[9]["step/applied"] = 0
    table = [evaluation(0, 6.0, maxvio=2.0), *table, evaluation(30, 3.5, maxvio=0.5)]
    folder = write_run(tmp_path / "run", table, steps=30, log="10:00:00 INFO [0] resumed from step 20\n")
    shown = once(capsys, folder)
    assert re.search(r"run  finished  step 30 of 30  15.4 k tokens  5.12 k tokens/s", shown)
    assert re.search(r"held-out loss +3.5000 █▁ +3.5000 to 6.0000", shown)
    assert re.search(r"MaxVio, held-out +0.500 █▁", shown)
    assert re.search(r"layer 0 ▆▄▄▄ busiest 0: 1.50x idle 0", shown)
    assert re.search(r"code +\d.\d{3} +9.0 +9 +50.0% +50.0%", shown)
    assert "step 10 skipped" in shown
    assert "step 20 resume resumed from step 20" in shown
    assert "\x1b" not in shown, "no colours where there is no terminal"
    assert max(map(len, shown.splitlines())) <= 110
    assert max(map(len, once(capsys, folder, 60).splitlines())) <= 60


def test_a_grid_is_a_line_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_grid(tmp_path / "grid", {"none": [4.0, 4.1], "sign": [3.5, 3.6]})
    state = json.loads((folder / "state.json").read_text())
    state["sign-2"] |= {"status": "failed", "reason": "loss was not finite"}
    state["sign-1"] |= {"status": "running"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "sign-2" / "metrics.jsonl").unlink()
    shown = once(capsys, folder, 140)
    assert "4 runs  2 done  1 running  1 failed" in shown
    assert re.search(r"none-1 \(baseline\) +done +20 +████████ +\d.\d{3} +4.0000 +0.100 +5,120", shown)
    assert re.search(r"sign-2 +failed +0 +░░░░░░░░ +– ", shown)
    assert "sign-2: loss was not finite" in shown


def test_wrong_arguments_and_empty_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "waiting for the first line" in once(capsys, tmp_path)
    assert run_command(watch.main, [str(tmp_path / "nowhere")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert run_command(watch.main, [str(tmp_path), "--every", "0"]) == 2
    assert "--every: 0 must be more than 0" in capsys.readouterr().err


@given(st.lists(st.text("ab{}é", max_size=6), max_size=20), st.lists(st.integers(1, 9), min_size=1, max_size=40))
def test_lines_come_once_and_whole_however_they_are_written(tmp_path_factory: pytest.TempPathFactory, lines: list[str],
                                                           cuts: list[int]) -> None:  # fmt: skip
    path = tmp_path_factory.mktemp("tail") / "file"
    tail, seen = LineTail(path), []
    assert tail.poll() == ([], False)
    content = "".join(line + "\n" for line in lines).encode()
    written = 0
    for size in [*cuts, len(content)]:
        with path.open("ab") as file:
            file.write(content[written : written + size])
        written = min(len(content), written + size)
        new, began_anew = tail.poll()
        assert not began_anew
        seen += new
    assert seen == lines


def test_a_long_run_is_read_a_block_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert long_record.write(tmp_path / "run" / "metrics.jsonl") > 20 << 20
    view = RunView(tmp_path / "run")
    with long_record.in_little_memory():
        assert view.poll()
    assert (view.run.last_step, view.run.steps.count) == (long_record.STEPS, long_record.STEPS)
    assert not view.poll()


def test_a_line_longer_than_a_block_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.line_tail._BLOCK_BYTES", 4)
    (tmp_path / "file").write_text("a\nbb\n" + "c" * 21 + "\nd\nhalf")
    tail, seen = LineTail(tmp_path / "file"), []
    while lines := tail.poll()[0]:
        seen.append(lines)
    assert seen == [["a"], ["bb"], ["c" * 21], ["d"]]
    with (tmp_path / "file").open("a") as file:
        file.write(" a line\n")
    assert tail.poll() == (["half a line"], False)


def test_a_file_that_was_cut_or_replaced_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one\ntwo\nthr")
    tail = LineTail(path)
    assert tail.poll() == (["one", "two"], False)
    path.write_text("one\n")
    assert tail.poll() == (["one"], True)
    path.write_text("one\nother two\nthree, longer than before\n")
    assert tail.poll() == (["other two", "three, longer than before"], False), "it goes on from the same beginning"
    path.write_text("ONE\nother two\nthree, longer than before\nfour\n")
    assert tail.poll() == (["ONE", "other two", "three, longer than before", "four"], True)
    (tmp_path / "new").write_text("one\n")
    os.replace(tmp_path / "new", path)
    assert tail.poll() == (["one"], True)
    path.unlink()
    assert tail.poll() == ([], False)


def test_a_resumed_run_is_read_again(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", training_rows(9), steps=20)
    view = RunView(folder)
    assert view.poll()
    assert view.run.last_step == 9
    assert not view.poll()
    staging = folder / "metrics.tmp"
    staging.write_text("".join(json.dumps(row) + "\n" for row in training_rows(4)))
    os.replace(staging, folder / "metrics.jsonl")
    assert view.poll()
    assert (view.run.last_step, view.run.steps.count) == (4, 4)


def test_a_run_that_is_locked_is_training(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", training_rows(9), steps=20)
    assert not in_use(folder)
    with (folder / ".lock").open("a+") as lock:
        assert not in_use(folder)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert in_use(folder)
    assert not in_use(folder)


def test_sparklines_and_clocks() -> None:
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline(range(800), 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([2, 2, 2], 8) == "▁▁▁"
    assert sparkline([np.nan, 1, np.nan, 2], 8) == "▁█"
    assert sparkline([], 8) == sparkline([1.0], 0) == ""
    assert clock(3725.4) == "1:02:05"


def _own_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests that run in the background of a shell ignore it


class Terminal:
    """A process in a terminal of its own."""

    def __init__(self, *arguments: str, width: int, height: int) -> None:
        self._screen, other = pty.openpty()
        self.resize(width, height)
        self.process = subprocess.Popen(
            command("launch.watch", *arguments), cwd=ROOT, env=environment(TERM="xterm-256color"), stdin=other,
            stdout=other, stderr=other, start_new_session=True, preexec_fn=_own_terminal,
        )  # fmt: skip
        os.close(other)
        os.set_blocking(self._screen, False)
        self.output = ""

    def resize(self, width: int, height: int) -> None:
        fcntl.ioctl(self._screen, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def wait_for(self, pattern: str, timeout: float = 60) -> str:
        """Read until the new output, without its colours, has the pattern; returns that output and forgets it."""
        end = time.monotonic() + timeout
        while True:
            plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.output)
            if re.search(pattern, plain):
                self.output = ""
                return plain
            assert time.monotonic() < end, f"{pattern!r} is not in {plain[-3000:]}"
            time.sleep(0.05)
            try:
                self.output += os.read(self._screen, 1 << 16).decode(errors="replace")
            except BlockingIOError:
                continue
            except OSError as error:
                if error.errno != errno.EIO:  # the other end is closed
                    raise

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._screen)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    write_run(tmp_path / "run", [*training_rows(9), evaluation(9, 3.0, maxvio=1.0)], steps=20)
    opened = Terminal(str(tmp_path / "run"), "--every", "0.1", width=100, height=40)
    yield opened
    opened.close()


def test_a_terminal_follows_the_file(terminal: Terminal, tmp_path: Path) -> None:
    metrics = tmp_path / "run" / "metrics.jsonl"
    terminal.wait_for(r"step 9 of 20")
    line = json.dumps(training_rows(10)[-1]) + "\n"
    with metrics.open("a") as file:
        file.write(line[:40])
        file.flush()
        time.sleep(0.4)
        file.write(line[40:])
    terminal.wait_for(r"step 10 of 20")
    metrics.write_text("".join(json.dumps(row) + "\n" for row in training_rows(5)))
    terminal.wait_for(r"step 5 of 20")
    terminal.resize(70, 24)
    drawn = terminal.wait_for(r"step 5 of 20[\s\S]*events")
    widths = {len(found) for found in re.findall(r"╭[^\r\n╭╮]*╮", drawn)}
    assert 70 in widths, widths
    os.killpg(terminal.process.pid, signal.SIGINT)
    terminal.wait_for(r"step 5 of 20[\s\S]*events")
    assert terminal.process.wait(timeout=20) == 0
