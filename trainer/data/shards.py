"""The shard of a domain and split, copied from the parts that have documents of it, in source order.

A shard is a pair of files in megatron-core's indexed format. Its builder takes one torch tensor a document and keeps
Python lists of all lengths, so workers would import torch and need a hundred bytes a document; these few lines copy
whole runs and keep four. That the bytes are the builder's own is a test (tests/data/test_prepare_stages.py).

Shape letters: N documents of a run.
"""

import hashlib
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from trainer.data.duplicates import DUPLICATE, KEPT, NEAR_DUPLICATE
from trainer.data.parts import errors_named

_DTYPE_CODES = {"int32": 4, "uint16": 8}
_SMALL_VOCABULARY = 65500
_CHUNK = 1 << 20


class Segment(NamedTuple):
    """A run of documents in a part's file."""

    path: str
    first_place: int
    """Place of the part's first row among all rows."""
    documents: tuple[int, int]
    """Its documents in the part, begin and end."""
    tokens: tuple[int, int]


class ShardTask(NamedTuple):
    """A shard to be written."""

    domain: str
    split: str
    prefix: str
    token_dtype: str
    verdicts: str
    segments: tuple[Segment, ...]


class Shard(NamedTuple):
    """What was written."""

    domain: str
    split: str
    documents: int
    tokens: int
    text_bytes: int
    duplicates: int
    near_duplicates: int
    files: dict[str, dict[str, Any]]
    """Size and sha256 of each file, by name."""


class _HashedFile:
    """A file whose sha256 is known when it is closed, and which is on the disk then."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._hasher = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes | memoryview) -> None:
        with errors_named(self._path):
            self._file.write(data)
        self._hasher.update(data)
        self._size += len(data)

    def close(self) -> dict[str, Any]:
        with errors_named(self._path), self._file as file:
            file.flush()
            os.fsync(file.fileno())
        return {"size": self._size, "sha256": self._hasher.hexdigest()}


def token_dtype(vocab_size: int) -> str:
    """Type of the tokens in a shard, as megatron-core chooses it."""
    return "uint16" if vocab_size < _SMALL_VOCABULARY else "int32"


def write_shard(task: ShardTask) -> Shard:
    """Copy a shard's documents, without the duplicates. Raises OSError."""
    verdicts: NDArray[np.uint8] = np.memmap(task.verdicts, dtype=np.uint8, mode="r")
    prefix = Path(task.prefix)
    lengths: list[NDArray[np.int32]] = []
    text_bytes = duplicates = near_duplicates = 0
    tokens_file = _HashedFile(Path(f"{prefix}.bin"))
    for segment in task.segments:
        with safe_open(segment.path, framework="numpy") as part:
            begin, end = segment.documents
            lengths_N, sizes_N, places_N = (part.get_slice(name)[begin:end] for name in ("length", "size", "position"))
            verdicts_N = verdicts[places_N + segment.first_place]
            is_kept_N = verdicts_N == KEPT
            tokens = part.get_slice("tokens")[segment.tokens[0] : segment.tokens[1]]
        if not is_kept_N.all():
            tokens = tokens[np.repeat(is_kept_N, lengths_N)]
            duplicates += int((verdicts_N == DUPLICATE).sum())
            near_duplicates += int((verdicts_N == NEAR_DUPLICATE).sum())
        tokens_file.write(np.ascontiguousarray(tokens).view(np.uint8).data)
        lengths.append(lengths_N[is_kept_N])
        text_bytes += int(sizes_N[is_kept_N].sum())
    all_lengths = np.concatenate([np.empty(0, np.int32), *lengths])
    files = {
        f"{prefix.name}.bin": tokens_file.close(),
        f"{prefix.name}.idx": write_index(Path(f"{prefix}.idx"), all_lengths, task.token_dtype),
    }
    return Shard(
        domain=task.domain,
        split=task.split,
        documents=len(all_lengths),
        tokens=int(all_lengths.sum(dtype=np.int64)),
        text_bytes=text_bytes,
        duplicates=duplicates,
        near_duplicates=near_duplicates,
        files=files,
    )


def write_index(path: Path, lengths_N: NDArray[np.int32], dtype: str) -> dict[str, Any]:
    """The `.idx` of documents of these lengths; returns its size and sha256.

    Magic, version, code of the token type, number of documents, number of document borders; then, for each document,
    its length (int32) and its first byte in the `.bin` (int64); then the borders (int64), counted in documents, since
    each is one sequence here.
    """
    file = _HashedFile(path)
    file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, _DTYPE_CODES[dtype], len(lengths_N), len(lengths_N) + 1))
    file.write(np.ascontiguousarray(lengths_N).view(np.uint8).data)
    for chunk in _starts(lengths_N, np.dtype(dtype).itemsize):
        file.write(chunk.view(np.uint8).data)
    for begin in range(0, len(lengths_N) + 1, _CHUNK):
        borders = np.arange(begin, min(begin + _CHUNK, len(lengths_N) + 1), dtype=np.int64)
        file.write(borders.view(np.uint8).data)
    return file.close()


def _starts(lengths_N: NDArray[np.int32], itemsize: int) -> Iterable[NDArray[np.int64]]:
    """First byte of each document, a chunk of documents at a time."""
    start = 0
    for begin in range(0, len(lengths_N), _CHUNK):
        sizes = lengths_N[begin : begin + _CHUNK].astype(np.int64) * itemsize
        ends = np.cumsum(sizes) + start
        yield ends - sizes
        start = int(ends[-1])
