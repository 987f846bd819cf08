"""From streams to parts: what is left to do is cut from the sources and given to all workers, in source order.

What an earlier start finished is verified, then kept: a stream that has not changed since is not read again, and a
part whose text is what it was is not tokenized again.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from trainer.data.config import DataConfig
from trainer.data.documents import BadDocument, Piece
from trainer.data.journal import Journal
from trainer.data.manifest import FORMAT
from trainer.data.parts import Part, PartSettings, PartTask, is_intact, make_part
from trainer.data.pool import Done, WorkerPool
from trainer.data.sources import Stream, bad_document
from trainer.errors import CheckpointError

_PART_BYTES = (1 << 18, 1 << 24)
JOURNAL = "journal.jsonl"
_PARTS = 1024  # wanted
_UNKNOWN_SIZE = 1 << 30  # of a shard of a hub dataset


class Status(NamedTuple):
    """How far a preparation is."""

    stage: str
    done: int = 0
    """Bytes of source read, of `total`."""
    total: int = 0
    """0 if unknown."""
    text_bytes: int = 0
    """Read in this stage, by this process's workers; kept parts of an earlier start are not counted."""
    tokens: int = 0


def make_parts(
    config: DataConfig,
    settings: dict[str, Any],
    streams: list[Stream],
    part_settings: PartSettings,
    pool: WorkerPool,
    progress: Callable[[Status], None],
) -> list[Part]:
    """All parts in source order; those that an earlier start finished are verified and kept."""
    part_bytes = _part_bytes(streams)
    libraries = [version(name) for name in ("tokenizers", "rensa")]
    key = settings_key(settings, part_settings.tokenizer_sha256, str(part_bytes), str(FORMAT), *libraries)
    done_bytes = text_bytes = tokens = 0
    total = sum(stream.size for stream in streams) if all(stream.size for stream in streams) else 0
    parts: list[Part] = []
    with Journal(Path(part_settings.folder) / JOURNAL, key) as journal:
        old = list(journal.parts.values())
        if old:
            progress(Status(f"verifying {len(old)} finished parts"))
            verified = pool.ordered(partial(is_intact, part_settings.folder), old)
            for part, intact in zip(old, verified, strict=True):
                if not intact:
                    del journal.parts[part.stream, part.number]
        seen = 0
        progress(Status("tokenizing", total=total))
        made: Part | BadDocument | _StreamEnd
        for made in pool.ordered(
            partial(make_part, settings=part_settings), _tasks(config, streams, journal, part_bytes)
        ):
            if isinstance(made, BadDocument):
                raise bad_document(made)
            if isinstance(made, _StreamEnd):
                journal.add_stream(*made)
                done_bytes += streams[made.stream].size - seen
                seen = 0
                continue
            parts.append(made)
            if journal.parts.get((made.stream, made.number)) != made:
                journal.add_part(made)
                text_bytes += made.input_bytes
                tokens += sum(run.tokens for run in made.runs)
            step = min(made.input_bytes, streams[made.stream].size - seen)
            seen, done_bytes = seen + step, done_bytes + step
            progress(Status("tokenizing", done_bytes, total, text_bytes, tokens))
    return parts


class _StreamEnd(NamedTuple):
    """Stands behind the last part of a stream."""

    stream: int
    identity: str
    num_parts: int


def _tasks(
    config: DataConfig, streams: list[Stream], journal: Journal, part_bytes: int
) -> Iterator[PartTask | Done[Part | _StreamEnd]]:
    """What there is to do, in source order. Streams that are known to be finished are not read."""
    for index, stream in enumerate(streams):
        finished = journal.finished(index, stream.identity)
        if finished is not None:
            yield from (Done(part) for part in finished)
            yield Done(_StreamEnd(index, stream.identity, len(finished)))
            continue
        filters = config.filters_of(stream.domain)
        number = 0
        for pieces in _cut(stream.pieces(), part_bytes):
            task = PartTask(index, number, pieces, filters)
            old = journal.parts.get((index, number))
            yield Done(old) if old is not None and old.input_digest == task.digest else task
            number += 1
        if stream.identify() != stream.identity:
            raise CheckpointError(f"{stream.name} changed since the preparation began; start again when it is complete")
        yield Done(_StreamEnd(index, stream.identity, number))


def _cut(pieces: Iterator[Piece], part_bytes: int) -> Iterator[tuple[Piece, ...]]:
    part: list[Piece] = []
    size = 0
    for piece in pieces:
        part.append(piece)
        size += len(piece.payload)
        if size >= part_bytes:
            yield tuple(part)
            part, size = [], 0
    if part:
        yield tuple(part)


def _part_bytes(streams: list[Stream]) -> int:
    """Small enough to keep all workers busy to the end, large enough for few files. A function of the source alone."""
    least, most = _PART_BYTES
    return min(most, max(least, sum(stream.size or _UNKNOWN_SIZE for stream in streams) // _PARTS))


def settings_key(settings: dict[str, Any], *more: str) -> str:
    """Changes if any setting of a preparation does, or one of the words."""
    return hashlib.sha256(json.dumps([settings, more], sort_keys=True).encode()).hexdigest()
