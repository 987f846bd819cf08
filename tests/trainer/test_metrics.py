"""From device values to lines of a file, and what is shown of them."""

import dataclasses
import io
import json
import logging
import math
import os
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from launch import compare
from launch._cli import run_command
from tests import long_record
from trainer.errors import ConfigError, StorageError
from trainer.metrics import JsonlLog, MetricBuffer, Parcel, newest_first, read_jsonl
from trainer.progress import ProgressDisplay, figures
from trainer.run_summary import summarize, summary_table
from trainer.telemetry import StepTelemetry
from trainer.train_state import TrainState


def test_values_come_out_as_they_went_in() -> None:
    buffer = MetricBuffer()
    for step in (1, 2):
        buffer.record("step", step)
        buffer.record("loss", torch.tensor(0.1 * step, dtype=torch.float64))
        buffer.record("dead", torch.tensor(step))
        buffer.close_step()
    assert buffer.flush() == [{"step": 1, "loss": 0.1, "dead": 1}, {"step": 2, "loss": 0.2, "dead": 2}]
    assert buffer.flush() == []


class Copy:
    """A copy from a device that takes its time."""

    is_done = False

    def query(self) -> bool:
        return self.is_done

    def synchronize(self) -> None:
        self.is_done = True


def test_rows_that_are_still_on_their_way_come_later_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    state = TrainState()
    telemetry = StepTelemetry(state, ("a",), flops_per_token=1.0, precision="fp32", device=torch.device("cpu"))
    copies: list[Copy] = []
    send = telemetry.buffer.send

    def slow_send() -> Parcel:
        copies.append(Copy())
        return dataclasses.replace(send(), arrival=copies[-1])

    monkeypatch.setattr(telemetry.buffer, "send", slow_send)

    def step(number: int, *, wait: bool = False) -> list[int]:
        telemetry.start_step()
        telemetry.buffer.record("step", number)
        telemetry.buffer.record("loss", torch.tensor(float(number)))
        telemetry._record_speed(torch.tensor(8))
        telemetry.buffer.close_step()
        rows = telemetry.flush(wait=wait)
        assert all(row["loss"] == row["step"] and "time/forward_s" in row for row in rows)
        return [row["step"] for row in rows]

    assert step(1) == []
    assert step(2) == []
    copies[1].is_done = True
    assert step(3) == [], "the second is here, but the first is not"
    copies[0].is_done = True
    assert step(4) == [1, 2]
    assert step(5, wait=True) == [3, 4, 5]
    assert not telemetry._sent


def test_vectors_are_lists(tmp_path: Path) -> None:
    buffer = MetricBuffer()
    buffer.record("loads", torch.tensor([3, 1, 2]))
    buffer.record("bias", torch.tensor([0.5, math.nan]))
    buffer.record("step", 1)
    buffer.close_step()
    JsonlLog(tmp_path / "m.jsonl").append(buffer.flush())
    assert read_jsonl(tmp_path / "m.jsonl") == [{"loads": [3, 1, 2], "bias": [0.5, None], "step": 1}]


def test_matrices_are_lists_of_rows_and_no_array_is_reduced(tmp_path: Path) -> None:
    buffer = MetricBuffer()
    buffer.record("loads", torch.tensor([[3, 1], [2, 5], [0, 4]]))
    buffer.record("bias", torch.tensor([[0.5, math.nan]]))
    buffer.record("step", 1)
    buffer.close_step()
    JsonlLog(tmp_path / "m.jsonl").append(buffer.flush())
    assert read_jsonl(tmp_path / "m.jsonl") == [{"loads": [[3, 1], [2, 5], [0, 4]], "bias": [[0.5, None]], "step": 1}]
    with pytest.raises(ValueError, match="'loads' is an array: it cannot be reduced by mean"):
        buffer.record("loads", torch.zeros(2, 2), "mean")


def test_a_name_twice_is_an_error() -> None:
    buffer = MetricBuffer()
    buffer.record("loss", 1.0)
    with pytest.raises(ValueError, match="'loss' is recorded twice"):
        buffer.record("loss", 2.0)


def test_lines_read_back_bit_for_bit(tmp_path: Path) -> None:
    values = [0.1, 1 / 3, math.pi * 1e-300, float(torch.rand(()).item())]
    JsonlLog(tmp_path / "m.jsonl").append({"step": n, "loss": value} for n, value in enumerate(values))
    assert [row["loss"].hex() for row in read_jsonl(tmp_path / "m.jsonl")] == [value.hex() for value in values]


def test_values_that_json_does_not_have_are_null(tmp_path: Path) -> None:
    JsonlLog(tmp_path / "m.jsonl").append([{"step": 1, "a": math.nan, "b": math.inf, "c": 0.0}])
    assert read_jsonl(tmp_path / "m.jsonl") == [{"step": 1, "a": None, "b": None, "c": 0.0}]


def test_truncation_drops_later_rows_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    JsonlLog(path).append({"step": n, "loss": n / 3} for n in range(1, 8))
    with path.open("a") as file:
        file.write('{"step": 8, "lo')
    JsonlLog(path).truncate_after(5)
    assert [row["step"] for row in read_jsonl(path)] == [1, 2, 3, 4, 5]
    path.write_text('{"step": 1}\n{oops\n{"step": 2}\n')
    with pytest.raises(ConfigError, match="line 2 is not JSON"):
        read_jsonl(path)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{}", "is no row of metrics: it has no step"),
        (b"[1]", "is no row of metrics"),
        (b'{"step": "7"}', "is no row of metrics"),
        (b'{"step": 3, "note": "caf\xe9"}', "is not JSON .*can't decode byte 0xe9"),
    ],
)
def test_a_line_that_is_no_row_is_refused_by_readers_and_by_a_resumed_run(
    line: bytes, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(ConfigError, match=f"line 2 {says}"):
        read_jsonl(path)
    with pytest.raises(ConfigError, match=f"a line near its end {says}.*; remove that line"):
        JsonlLog(path).truncate_after(1)
    path.write_bytes(b'{"step": 1}\n' + line)
    assert read_jsonl(path) == [{"step": 1}], "cut short by a crash"


def test_a_file_of_a_million_steps_is_cut_at_once(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with path.open("w") as file:
        file.writelines(
            f'{{"step": {n}, "loss": 2.5, "moe/loads": [1.0, 1.0, 1.0, 1.0]}}\n' for n in range(1, 10**6 + 1)
        )
    start = time.process_time()
    JsonlLog(path).truncate_after(10**6 - 500)
    assert time.process_time() - start < 0.5, "only the end is read"
    with path.open("rb") as file:
        file.seek(-100, os.SEEK_END)
        assert json.loads(file.read().splitlines()[-1])["step"] == 10**6 - 500


@given(
    st.lists(st.text("ab\n\u2028é", max_size=40), max_size=12), st.sampled_from(["", "\n", '\n{"step": 9, "lo']),
    st.integers(1, 50),
)  # fmt: skip
def test_from_its_end_a_file_has_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], end: str, block: int
) -> None:
    path = tmp_path_factory.mktemp("rows") / "m.jsonl"
    path.write_text(
        "\n".join(json.dumps({"step": n, "text": text}) for n, text in enumerate(texts)) + end * bool(texts)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.metrics._BLOCK_BYTES", block)
        assert list(newest_first(path)) == read_jsonl(path)[::-1]


def test_what_was_measured_last_is_found_at_once(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    long_record.write(path)
    with long_record.in_little_memory(1 << 20):
        assert next(row for row in newest_first(path) if "loss" in row)["step"] == long_record.STEPS
    path.write_text('{"step": 1}\n{oops\n{"step": 2}\n')
    with pytest.raises(ConfigError, match="a line is not JSON"):
        list(newest_first(path))
    with pytest.raises(ConfigError, match="name a run folder"):
        next(newest_first(tmp_path / "none"))


@pytest.mark.parametrize("step", range(-1, 9))
def test_truncation_keeps_every_line_of_the_step(tmp_path: Path, step: int) -> None:
    path = tmp_path / "m.jsonl"
    steps = [0, 0, 1, 2, 2, 2, 5, 7, 7]
    JsonlLog(path).append({"step": n} for n in steps)
    JsonlLog(path).truncate_after(step)
    assert [row["step"] for row in read_jsonl(path)] == [n for n in steps if n <= step]


def test_a_folder_that_is_gone_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"m\.jsonl"):
        JsonlLog(tmp_path / "gone" / "m.jsonl").append([{"step": 1}])


ROW = {"step": 3, "loss": 2.5, "lr": 1e-3, "tokens_per_s": 1234.0, "moe/maxvio_batch": 0.25, "reweight/ess": None}


def test_display_without_a_terminal_writes_plain_lines(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("evenkeel").propagate = True
    display = ProgressDisplay(4, 0, Console(file=io.StringIO()))
    with caplog.at_level(logging.INFO, logger="evenkeel"):
        for step in range(1, 5):
            display.show(ROW | {"step": step})
        display.close()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2, "the first and the last: the others came within ten seconds"
    assert lines[-1].startswith("step 4/4 loss 2.5000 lr 1.00e-03 tok/s 1,234 maxvio 0.250 eta 0:00:00")


def test_display_in_a_terminal_is_live() -> None:
    screen = io.StringIO()
    display = ProgressDisplay(4, 0, Console(file=screen, force_terminal=True, width=160))
    display.show(ROW)
    display.close()
    assert "3/4" in screen.getvalue()
    assert "loss 2.5000" in screen.getvalue()


def test_skipped_steps_show() -> None:
    assert figures(ROW | {"step/applied": 0}).endswith("SKIPPED")


def evaluation(step: int, ppl: float, maxvio: float) -> dict[str, float]:
    return {
        "step": step,
        "eval/loss": math.log(ppl),
        "eval/ppl": ppl,
        "eval/a/ppl": ppl * 2,
        "eval/maxvio_global": maxvio,
    }


def test_summary_compares_first_and_last() -> None:
    rows = [
        evaluation(0, 100, 2.0),
        {"step": 1, "loss": 4.0, "reweight/ess": 0.9},
        {"step": 2, "loss": 3.0, "reweight/ess": 0.7},
        evaluation(2, 10, 0.5),
    ]
    summary = summarize(rows, ["a", "unseen"])
    assert summary is not None
    assert summary.ppl == {"a": (200, 20), "all": (100, 10)}
    assert summary.loss_change("all") == pytest.approx(-0.5)
    assert summary.maxvio_global == (2.0, 0.5)
    assert summary.mean_ess == pytest.approx(0.8)
    screen = io.StringIO()
    Console(file=screen, width=100).print(summary_table(summary))
    assert "-50.0%" in screen.getvalue()
    assert summarize([{"step": 1, "loss": 1.0}], ["a"]) is None


def write_run(folder: Path, losses: list[float]) -> Path:
    folder.mkdir()
    rows = [{"step": n, "loss": loss, "time/step_s": n * 0.1} for n, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_compare_tells_equal_from_close_from_different(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, same = write_run(tmp_path / "a", [1.0, 2.0]), write_run(tmp_path / "same", [1.0, 2.0])
    close, short = write_run(tmp_path / "close", [1.0, 2.0 + 1e-9]), write_run(tmp_path / "short", [1.0])
    assert run_command(compare.main, [str(a), str(same)]) == 0
    assert "agree (bit for bit" in capsys.readouterr().out
    assert run_command(compare.main, [str(a), str(close)]) == 1
    assert "step 2: loss: 0x1.0000000000000p+1 !=" in capsys.readouterr().out
    assert run_command(compare.main, [str(a), str(close), "--rtol", "1e-6"]) == 0
    assert run_command(compare.main, [str(a), str(short)]) == 1
    assert run_command(compare.main, [str(a), str(tmp_path / "none")]) == 2


def test_compare_does_not_agree_about_what_it_has_not_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_run(tmp_path / "a", [1.0, 2.0]), write_run(tmp_path / "b", [1.0, 2.5])
    empty = write_run(tmp_path / "empty", [])
    for arguments, says in (
        ([a, b, "--keys", "los"], "--keys: no row of either run has 'los'; did you mean 'loss'?"),
        ([a, b, "--keys", "loss,xyz"], "no row of either run has 'xyz'; there are loss, step, time/step_s"),
        ([a, b, "--keys", ","], "no row of either run has ''"),
        ([empty, empty], f"{empty}: has no rows yet; there is nothing to compare"),
        ([a, empty], f"{empty}: has no rows yet"),
    ):
        assert run_command(compare.main, [str(each) for each in arguments]) == 2
        assert says in capsys.readouterr().err
    assert run_command(compare.main, [str(a), str(b), "--keys", "step, time/step_s"]) == 0, "times, if they are named"
    (b / "metrics.jsonl").write_text((a / "metrics.jsonl").read_text().replace("0.1", "0.3"))
    assert run_command(compare.main, [str(a), str(b)]) == 0
    assert run_command(compare.main, [str(a), str(b), "--keys", "time/step_s"]) == 1
