"""Metrics from the device to `metrics.jsonl`.

Decisions:
- Values stay on the device until `flush`, which copies all of them at once.
- The file is the record of the run: one JSON object a line, floats written so that they read back bit for bit.
  JSON has no NaN or infinity: such values are written as null.
- Two kinds of lines share the file, both with `step`: training steps (key `loss`) and evaluations (keys `eval/...`).
"""

import errno
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import ranks
from trainer.errors import ConfigError, StorageError
from trainer.hooks import MetricReduction, MetricValue

Row = dict[str, Any]


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

    def flush(self) -> list[Row]:
        """Finished rows as host numbers (arrays as nested lists), by one copy from the device, and forget them."""
        rows, self._closed = self._closed, []
        tensors = [value for row in rows for value in row.values() if isinstance(value, Tensor)]
        host: list[float] = torch.cat([tensor.double().flatten() for tensor in tensors]).tolist() if tensors else []
        values = iter(host)

        def on_host(value: MetricValue) -> Any:
            if not isinstance(value, Tensor):
                return value
            kind = float if value.is_floating_point() else int
            found: Any = [kind(next(values)) for _ in range(value.numel())]
            for size in reversed(value.shape[1:]):
                found = [found[start : start + size] for start in range(0, len(found), size)]
            return found if value.ndim else found[0]

        return [{name: on_host(value) for name, value in row.items()} for row in rows]


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
        """Drop every line of a later step, and a last line that a crash has cut: a resumed run writes them again."""
        if not self._path.exists():
            return
        kept = [row for row in read_jsonl(self._path) if row["step"] <= step]
        staging = self._path.with_suffix(".tmp")
        try:
            with staging.open("w") as file:
                file.writelines(json.dumps(row) + "\n" for row in kept)
                file.flush()
                os.fsync(file.fileno())
            os.replace(staging, self._path)
        except OSError as error:
            raise _storage_error(self._path, error) from error


def read_jsonl(path: Path) -> list[Row]:
    """Rows of a metrics file; a last line cut short is left out.

    Raises ConfigError if the file is missing or another line is not JSON.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a run folder or its metrics.jsonl") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise ConfigError(f"{path}: line {number} is not JSON ({error})") from error
    return rows


def rows_with(rows: Sequence[Row], key: str) -> list[Row]:
    """Rows that hold `key`: `loss` picks training steps, `eval/loss` evaluations."""
    return [row for row in rows if key in row]


def _json_value(value: Any) -> Any:
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    if isinstance(value, dict):
        return {key: _json_value(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _storage_error(path: Path, error: OSError) -> StorageError:
    reason = "no space left" if error.errno == errno.ENOSPC else error.strerror
    return StorageError(f"{path}: {reason}; free space or make it writable, then start again to resume")
