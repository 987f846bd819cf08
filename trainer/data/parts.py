"""One part of a preparation: consecutive documents, filtered and tokenized into one file, by one worker.

What is in the file depends on the part's text, the tokenizer and the filters alone, so it does not matter which
worker made it, when, or how often. Documents are grouped by domain and split, in source order within a group, so that
a shard is later copied from a few long runs. Imports nothing heavy: workers start in a fraction of a second.

Shape letters: N documents of the part, P MinHash values.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save
from tokenizers import Tokenizer

from trainer.data.documents import BadDocument, Document, Piece, parse
from trainer.data.mixture import FilterConfig
from trainer.data.near_duplicates import signature

DIGEST_BYTES = 16
"""Of the sha256 of a text, kept to find its copies: two texts of a trillion agree by chance once in 10^14 corpora."""
_BATCH_CHARACTERS = 1 << 18  # an encoding takes a hundred times the memory of its text
_MAX_EXAMPLES = 20


class PartSettings(NamedTuple):
    """What all parts of a preparation share."""

    folder: str
    tokenizer: str
    tokenizer_sha256: str
    end_of_document: int
    token_dtype: str
    heldout_fraction: float
    skip_bad: bool


class PartTask(NamedTuple):
    """A part to be made."""

    stream: int
    number: int
    pieces: tuple[Piece, ...]
    filters: FilterConfig

    @property
    def digest(self) -> str:
        """Changes if what goes into the part does."""
        hasher = hashlib.sha256(repr(self.filters).encode())
        for piece in self.pieces:
            hasher.update(repr(piece._replace(payload=b"")).encode())
            hasher.update(piece.payload)
        return hasher.hexdigest()

    @property
    def num_bytes(self) -> int:
        return sum(len(piece.payload) for piece in self.pieces)


class Run(NamedTuple):
    """Documents of one domain and split that lie together in a part, in source order."""

    domain: str
    split: str
    documents: int
    tokens: int


class Part(NamedTuple):
    """What is known of a finished part without opening it; plain values, for the journal."""

    stream: int
    number: int
    input_digest: str
    input_bytes: int
    file_sha256: str
    rows: int
    """Documents read, dropped ones included: positions in the part are below this."""
    runs: list[Run]
    dropped: dict[str, dict[str, int]]
    """How many documents of a domain were dropped for what; the reasons are named after the options."""
    bad: list[str]
    """Problems of the first skipped documents."""
    text_bytes: int

    def to_json(self) -> str:
        """One line."""
        return json.dumps(self._asdict() | {"runs": [list(run) for run in self.runs]})

    @classmethod
    def from_json(cls, line: str) -> "Part":
        """Raises ValueError, KeyError or TypeError for anything `to_json` did not write."""
        values = json.loads(line)
        return cls(**(values | {"runs": [Run(*run) for run in values["runs"]]}))


class Kept(NamedTuple):
    """A document that passed."""

    position: int
    domain: str
    is_heldout: bool
    digest: bytes
    size: int
    ids: NDArray[np.integer]


def part_path(folder: str | Path, stream: int, number: int) -> Path:
    """Where a part lies."""
    return Path(folder) / f"part-{stream:06d}-{number:06d}.safetensors"


def make_part(task: PartTask, settings: PartSettings) -> Part | BadDocument:
    """Tokenize a part and write it; or the first bad document, unless those are skipped. Raises OSError."""
    tokenizer = _load(settings.tokenizer, settings.tokenizer_sha256)
    dropped: dict[str, Counter[str]] = {}
    bad: list[str] = []
    kept: list[Kept] = []
    rows = 0

    def drop(domain: str, reason: str) -> None:
        dropped.setdefault(domain, Counter())[reason] += 1

    seen: set[bytes] = set()
    chosen: list[tuple[int, Document, bytes]] = []
    for found in (document for piece in task.pieces for document in parse(piece)):
        rows += 1
        if isinstance(found, BadDocument):
            if not settings.skip_bad:
                return found
            drop(found.domain, "bad_document")
            bad.append(found.problem)
        elif reason := task.filters.length_problem(len(found.text), "characters"):
            drop(found.domain, reason)
        else:
            digest = text_digest(found.text)
            if digest in seen:
                drop(found.domain, "duplicate")
            else:
                seen.add(digest)
                chosen.append((rows - 1, found, digest))
    for batch in _batches(chosen):
        texts = [document.text for _, document, _ in batch]
        for (position, document, digest), encoding in zip(batch, tokenizer.encode_batch_fast(texts), strict=True):
            ids = encoding.ids
            if reason := task.filters.length_problem(len(ids), "tokens"):
                drop(document.domain, reason)
                continue
            ids.append(settings.end_of_document)
            tokens = np.array(ids, dtype=settings.token_dtype)
            is_heldout = _is_heldout(digest, settings.heldout_fraction)
            kept.append(Kept(position, document.domain, is_heldout, digest, len(document.text.encode()), tokens))
    kept.sort(key=lambda each: (each.domain, each.is_heldout, each.position))
    sha256 = _write(part_path(settings.folder, task.stream, task.number), kept, task.filters, settings)
    return Part(
        stream=task.stream,
        number=task.number,
        input_digest=task.digest,
        input_bytes=task.num_bytes,
        file_sha256=sha256,
        rows=rows,
        runs=_runs(kept),
        dropped={domain: dict(reasons) for domain, reasons in dropped.items()},
        bad=bad[:_MAX_EXAMPLES],
        text_bytes=sum(each.size for each in kept),
    )


def load_part(folder: str | Path, part: Part, *names: str) -> list[NDArray[Any]]:
    """Arrays of a part, by name: `tokens`, and for each kept document its `length` in tokens, `position` among the
    rows, `digest` [N, 16], `size` in bytes, and `signature` [N, P] if near-duplicates are looked for."""
    with safe_open(part_path(folder, part.stream, part.number), framework="numpy") as file:
        return [file.get_tensor(name) for name in names]


def is_intact(folder: str | Path, part: Part) -> bool:
    """Whether the file of a part is what was written."""
    try:
        with part_path(folder, part.stream, part.number).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == part.file_sha256
    except OSError:
        return False


@contextmanager
def errors_named(path: Path) -> Iterator[None]:
    """Have an OSError say which file it is about, which those of writes do not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def text_digest(text: str) -> bytes:
    """What copies of a text have in common, 16 bytes."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:DIGEST_BYTES]


def is_heldout(text: str, fraction: float) -> bool:
    """Whether a document is held out: a function of its text alone."""
    return _is_heldout(text_digest(text), fraction)


@lru_cache(maxsize=1)
def _load(path: str, sha256: str) -> Tokenizer:
    """A tokenizer, once a process; another one in the same place is another."""
    return Tokenizer.from_file(path)


def _is_heldout(digest: bytes, fraction: float) -> bool:
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _batches(chosen: Sequence[tuple[int, Document, bytes]]) -> Iterator[list[tuple[int, Document, bytes]]]:
    batch: list[tuple[int, Document, bytes]] = []
    size = 0
    for each in chosen:
        batch.append(each)
        size += len(each[1].text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _runs(kept: Sequence[Kept]) -> list[Run]:
    runs: dict[tuple[str, str], list[int]] = {}
    for each in kept:
        counts = runs.setdefault((each.domain, "heldout" if each.is_heldout else "train"), [0, 0])
        counts[0] += 1
        counts[1] += len(each.ids)
    return [Run(domain, split, *counts) for (domain, split), counts in runs.items()]


def _write(path: Path, kept: Sequence[Kept], filters: FilterConfig, settings: PartSettings) -> str:
    """Write the arrays so that the file is whole or absent; returns its sha256."""
    digests = b"".join(each.digest for each in kept)
    arrays: dict[str, NDArray[Any]] = {
        "tokens": np.concatenate([np.empty(0, settings.token_dtype), *(each.ids for each in kept)]),
        "length": np.array([len(each.ids) for each in kept], dtype=np.int32),
        "position": np.array([each.position for each in kept], dtype=np.int64),
        "digest": np.frombuffer(digests, dtype=np.uint8).reshape(-1, DIGEST_BYTES),
        "size": np.array([each.size for each in kept], dtype=np.int64),
    }
    if filters.near_duplicates:
        arrays["signature"] = np.array([signature(each.ids[:-1]) for each in kept], dtype=np.uint32)
    # The process in the name: a worker that outlived its preparation may be writing the same part.
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    content = save(arrays)
    with errors_named(temporary):
        temporary.write_bytes(content)
    os.replace(temporary, path)
    return hashlib.sha256(content).hexdigest()
