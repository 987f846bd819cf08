"""Metrics from the device to `metrics.jsonl`.

Decisions:
- Values stay on the device until they are sent to the host, all of them in one copy, which on CUDA nobody waits for.
- The file is the record of the run: one JSON object a line, floats written so that they read back bit for bit.
  JSON has no NaN or infinity: such values are written as null.
- Two kinds of lines share the file, both with `step`: training steps (key `loss`) and evaluations (keys `eval/...`).
"""

import errno
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from trainer import ranks
from trainer.errors import ConfigError, StorageError
from trainer.hooks import MetricReduction, MetricValue

Row = dict[str, Any]

_BLOCK_BYTES = 1 << 16


class MetricBuffer:
    """Collects the values of a step under their names, and finished steps until they are flushed."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[MetricValue, MetricReduction]] = {}
        self._closed: list[dict[str, MetricValue]] = []

    def record(self, name: str, value: MetricValue, reduction: MetricReduction = "same") -> None:
        """Add one value, or a vector or matrix of them, to the open row.

        `reduction` says how ranks that hold different values become one number; an array must be the same on all.
        Raises ValueError if the row has the name already, or if an array comes with a reduction.
        """
        if reduction != "same" and isinstance(value, Tensor) and value.ndim:
            raise ValueError(f"metric '{name}' is an array: it cannot be reduced by {reduction}")
        if name in self._open:
            raise ValueError(f"metric '{name}' is recorded twice in one step")
        self._open[name] = (value.detach() if isinstance(value, Tensor) else value, reduction)

    def close_step(self) -> None:
        """Finish the open row. Values with a reduction take one collective for each kind in use."""
        row = {name: value for name, (value, _) in self._open.items()}
        for kind in ("mean", "sum", "max"):
            names = [name for name, (_, reduction) in self._open.items() if reduction == kind]
            if not names:
                continue
            device = ranks.device()
            values = torch.stack([torch.as_tensor(row[name], dtype=torch.float64).to(device) for name in names])
            ranks.all_reduce_(values, "max" if kind == "max" else "sum")
            row.update(zip(names, values / ranks.world_size() if kind == "mean" else values, strict=True))
        self._closed.append(row)
        self._open = {}

    def send(self) -> "Parcel":
        """Start finished rows on their way to the host, in one copy, and forget them here."""
        rows, self._closed = self._closed, []
        tensors = [value for row in rows for value in row.values() if isinstance(value, Tensor)]
        if not tensors:
            return Parcel(rows, torch.empty(0, dtype=torch.float64))
        values = torch.cat([tensor.double().flatten() for tensor in tensors])
        if not values.is_cuda:
            return Parcel(rows, values)
        # What the host has not pinned it must wait for.
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        arrival = torch.cuda.Event()
        arrival.record()
        return Parcel(rows, host, arrival)

    def flush(self) -> list[Row]:
        """Finished rows as host numbers, waited for."""
        return self.send().open()


class Arrival(Protocol):
    """The moment a copy is complete: a CUDA event."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


@dataclass(frozen=True)
class Parcel:
    """Rows whose numbers are on their way to the host."""

    rows: Sequence[Mapping[str, MetricValue]]
    host: Tensor
    """Every tensor of the rows in turn, flat, float64."""
    arrival: Arrival | None = None
    """None if the numbers were on the host all the time."""

    @property
    def is_here(self) -> bool:
        """Whether `open` would not wait."""
        return self.arrival is None or self.arrival.query()

    def open(self) -> list[Row]:
        """The rows with host numbers, arrays as nested lists; waits for them."""
        if self.arrival is not None:
            self.arrival.synchronize()
        values = iter(self.host.tolist())

        def on_host(value: MetricValue) -> Any:
            if not isinstance(value, Tensor):
                return value
            kind = float if value.is_floating_point() else int
            found: Any = [kind(next(values)) for _ in range(value.numel())]
            for size in reversed(value.shape[1:]):
                found = [found[start : start + size] for start in range(0, len(found), size)]
            return found if value.ndim else found[0]

        return [{name: on_host(value) for name, value in row.items()} for row in self.rows]


class JsonlLog:
    """The metrics file of a run."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows and hand them to the operating system, so that a killed process loses none.

        Raises StorageError if the disk refuses.
        """
        text = "".join(json.dumps({k: _json_value(v) for k, v in row.items()}, allow_nan=False) + "\n" for row in rows)
        try:
            with self._path.open("a") as file:
                file.write(text)
        except OSError as error:
            raise _storage_error(self._path, error) from error

    def truncate_after(self, step: int) -> None:
        """Drop every line of a later step, and a last line that a crash has cut: a resumed run writes them again.

        Steps never decrease along the file, so only its end is read: a run of a million steps resumes as fast.
        """
        try:
            if not self._path.exists() or not self._path.stat().st_size:
                return
            with self._path.open("r+b") as file:
                file.truncate(_end_of_step(file, step))
                os.fsync(file.fileno())
        except OSError as error:
            raise _storage_error(self._path, error) from error
        except ValueError as error:
            raise ConfigError(f"{self._path}: a line near its end {error}; remove that line") from error


def _end_of_step(file: BinaryIO, step: int) -> int:
    """Bytes up to the end of the last line of `step` or before."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        end = data.rfind(b"\n") + 1
        while end:
            start = data.rfind(b"\n", 0, end - 1) + 1
            if _row(data[start:end])["step"] <= step:
                return end
            end = start
    return 0


def _row(line: bytes) -> Row:
    """The row on a line. Raises ValueError with what the line is instead."""
    try:
        row = json.loads(line)
    except ValueError as error:  # of bytes that are no UTF-8, too
        raise ValueError(f"is not JSON ({error})") from error
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise ValueError("is no row of metrics: it has no step")
    return row


def read_jsonl(path: Path) -> list[Row]:
    """Rows of a metrics file; a last line cut short is left out.

    Raises ConfigError if the file is missing or another line is no row.
    """
    return list(iter_jsonl(path))


def iter_jsonl(path: Path) -> Iterator[Row]:
    """The same row by row, for files that are larger than memory."""
    return _rows(path, lambda file: ((f"line {number}", line) for number, line in enumerate(file, start=1)))


def newest_first(path: Path) -> Iterator[Row]:
    """The same from the end, a block at a time: what was measured last in a long run is found at once."""
    return _rows(path, lambda file: (("a line", line) for line in _lines_backwards(file)))


def _rows(path: Path, places_and_lines: Callable[[BinaryIO], Iterable[tuple[str, bytes]]]) -> Iterator[Row]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a run folder or its metrics.jsonl") from error
    with file:
        for place, line in places_and_lines(file):
            try:
                yield _row(line)
            except ValueError as error:
                if line.endswith(b"\n"):
                    raise ConfigError(f"{path}: {place} {error}") from error


def _lines_backwards(file: BinaryIO) -> Iterator[bytes]:
    """Lines from the last to the first, with their ends; the last may have none."""
    position, rest = file.seek(0, os.SEEK_END), b""
    while position:
        size = min(position, _BLOCK_BYTES)
        position -= size
        file.seek(position)
        rest = file.read(size) + rest
        first, *whole = rest.splitlines(keepends=True)
        yield from reversed(whole)
        rest = first
    if rest:
        yield rest


class EvenRows:
    """An even selection from rows whose number is not known beforehand."""

    def __init__(self, at_least: int = 60) -> None:
        """Keeps at least that many rows, if there are as many, and at most twice as many, and the newest."""
        self._limit, self._stride, self._seen = 2 * at_least, 1, 0
        self._rows: list[Row] = []
        self._last: Row | None = None

    def add(self, row: Row) -> None:
        """Take one row, or not."""
        if self._seen % self._stride == 0:
            self._rows.append(row)
            if len(self._rows) > self._limit:
                self._rows, self._stride = self._rows[::2], 2 * self._stride
        self._last, self._seen = row, self._seen + 1

    def rows(self) -> list[Row]:
        """The selection, with the newest row at its end."""
        kept = list(self._rows)
        if self._last is not None and kept[-1] is not self._last:
            kept.append(self._last)
        return kept


def _json_value(value: Any) -> Any:
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    if isinstance(value, dict):
        return {key: _json_value(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _storage_error(path: Path, error: OSError) -> StorageError:
    reason = "no space left" if error.errno == errno.ENOSPC else error.strerror
    return StorageError(f"{path}: {reason}; free space or make it writable, then start again to resume")
