"""Reads what W&B writes when it is offline: a log of records in the framing of LevelDB.

W&B's Python package had a reader until it moved into its Go program; the messages are still its own.
"""

import json
import struct
from pathlib import Path
from typing import Any

_BLOCK, _HEADER, _FULL, _LAST = 32768, 7, 1, 4


def records(path: Path) -> list[Any]:
    """The records of a .wandb file, as W&B's protobuf messages."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts, found = path.read_bytes(), _HEADER, [], []
    assert data.startswith(b":W&B"), "the file has its magic"
    while at + _HEADER <= len(data):
        room = _BLOCK - at % _BLOCK
        if room < _HEADER:
            at += room
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + _HEADER])
        parts.append(data[at + _HEADER : at + _HEADER + size])
        at += _HEADER + size
        if kind in (_FULL, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            found.append(record)
            parts = []
    return found


def config_of(run: Any) -> dict[str, Any]:
    """The configuration that a run record carries, without W&B's own part."""
    return {item.key: json.loads(item.value_json) for item in run.config.update if item.key != "_wandb"}


def values_of(items: Any) -> dict[str, Any]:
    """The values of a history or summary record by name; the parts of a nested one are joined by slashes."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
