"""From the configuration to streams of documents: files, hub datasets, or the embedded corpus.

A stream is what a preparation reads, skips or reads again as one: a file, or neighbouring small files. Lines of text
are read by trainer/data/lines.py, which can name the row that is wrong; tables by `datasets`, whose one importer this
is. Nothing asks the network unless a `hub:` source is named.
"""

import glob
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trainer.data.config import DataConfig
from trainer.data.documents import BadDocument, Document, Piece, parse
from trainer.data.lines import CHUNK, PACKED, json_line_pieces, text_piece
from trainer.data.local_python import MOST_BYTES, local_python_documents
from trainer.data.mixture import HUB, LOCAL_PYTHON, DomainConfig
from trainer.errors import CheckpointError, ConfigError, StorageError

_log = logging.getLogger("evenkeel")
_LINES = {".jsonl": json_line_pieces, ".txt": text_piece}
_TABLES = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".tar": "webdataset"}
_END_MARKS = {".tar": (bytes(1024),), ".arrow": (b"\xff\xff\xff\xff\0\0\0\0", b"ARROW1")}
"""What complete files end with, of formats whose readers take the end of a truncated one for the end of the data."""
_GROUP_BYTES = 1 << 24
_SHARD_BYTES = 1 << 28  # of a downloaded dataset: what is read again after a kill
_TABLE_ROWS = 64  # records read at once


class Stream(NamedTuple):
    """Documents that are read one after the other."""

    name: str
    pieces: Callable[[], Iterator[Piece]]
    size: int
    """Bytes on disk, about; 0 if unknown."""
    identify: Callable[[], str]
    """Its identity now: another one if the source may have changed; empty if nothing tells."""
    identity: str
    """Its identity when the stream was found."""
    files: dict[str, int]
    """Size of each local file."""
    domain: str = ""
    """Its domain of the mixture, if there is one."""


def streams_of(config: DataConfig) -> list[Stream]:
    """The streams of a configuration, in their fixed order, which says which of two equal documents stays.

    Raises ConfigError for a source that is not there.
    """
    if not config.domains:
        return _streams("data.source", DomainConfig(source=config.source), config, domain=None)
    return [
        stream._replace(domain=name)
        for name, entry in config.domains.items()
        for stream in _streams(f"data.domains.{name}.source", entry, config, domain=name)
    ]


def read_documents(config: DataConfig) -> Iterator[Document]:
    """All documents of the configuration, in order, before any filter.

    Raises ConfigError that names the file and row of a document that is missing, unreadable or not text, unless
    data.on_bad_document says to skip it.
    """
    for stream in streams_of(config):
        for piece in stream.pieces():
            for document in parse(piece):
                if isinstance(document, Document):
                    yield document
                elif config.on_bad_document == "stop":
                    raise bad_document(document)


def bad_document(found: BadDocument) -> ConfigError:
    """The error that ends a preparation at this document."""
    return ConfigError(f"{found.problem}; mend it, or skip such documents with data.on_bad_document=skip")


def _streams(key: str, entry: DomainConfig, config: DataConfig, *, domain: str | None) -> list[Stream]:
    template = Piece(
        file="", first_row=1, rows=0, kind="json_lines", payload=b"", text_field=entry.text_field or config.text_field,
        domain_field="" if domain else config.domain_field, domain=domain or "",
    )  # fmt: skip
    if entry.source == LOCAL_PYTHON:
        return [Stream(LOCAL_PYTHON, lambda: _local_python_pieces(template), MOST_BYTES, lambda: "", "", {})]
    if entry.is_hub:
        return _hub_streams(key, entry, template)
    return [_file_stream(key, group, template) for group in _groups(_files(key, Path(entry.source)))]


def _files(key: str, source: Path) -> list[Path]:
    if not source.exists():
        raise ConfigError(f"{key}: {source} does not exist; give a file, a folder, hub:owner/name or local_python")
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    known = [path for path in files if _format(path)]
    if not known:
        raise ConfigError(f"{key}: {source} has no {', '.join([*_LINES, *_TABLES])} file")
    if others := {path.suffix for path in files if not _format(path)}:
        kinds = ", ".join(sorted(others)[:5])
        _log.warning(
            "%s: %s files of %s are of other kinds (%s): not read", key, len(files) - len(known), source, kinds
        )
    return known


def _format(path: Path) -> str:
    if path.suffix in _TABLES:
        return path.suffix
    suffix = Path(path.stem).suffix if path.suffix in PACKED else path.suffix
    return suffix if suffix in _LINES else ""


def _groups(paths: list[Path]) -> Iterator[list[Path]]:
    """Neighbouring files, together at most _GROUP_BYTES unless it is one: a million small files are few streams."""
    group: list[Path] = []
    total = 0
    for path in paths:
        size = path.stat().st_size
        if group and total + size > _GROUP_BYTES:
            yield group
            group, total = [], 0
        group.append(path)
        total += size
    yield group


def _file_stream(key: str, paths: list[Path], template: Piece) -> Stream:
    sizes = {str(path): path.stat().st_size for path in paths}

    def pieces() -> Iterator[Piece]:
        for path in paths:
            domain = template.domain or path.name.split(".")[0]
            yield from _file_pieces(key, path, template._replace(file=str(path), domain=domain))

    def identify() -> str:
        try:
            found = [(str(path), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in paths]
        except FileNotFoundError as error:
            raise _gone(key, error.filename) from error
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()

    name = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    return Stream(name, pieces, sum(sizes.values()), identify, identify(), sizes)


def _file_pieces(key: str, path: Path, template: Piece) -> Iterator[Piece]:
    """The pieces of a file; damage ends it with a bad piece after what could be read."""
    suffix = _format(path)
    after = 0
    try:
        if not path.stat().st_size:
            return
        if suffix in _TABLES:
            found = _table_pieces(_open_table(_TABLES[suffix], path), template)
        else:
            kind: Literal["text", "json_lines"] = "text" if suffix == ".txt" else "json_lines"
            found = _LINES[suffix](path, template._replace(kind=kind))
        for piece in found:
            yield piece
            after += piece.rows
        if suffix in _END_MARKS:
            _check_end(path, _END_MARKS[suffix])
    except ConfigError:
        raise
    except FileNotFoundError as error:
        raise _gone(key, str(path)) from error
    except Exception as error:  # pyarrow, datasets and the decompressors raise errors of many kinds
        if isinstance(error, OSError) and error.errno:
            raise StorageError(f"{path}: {error.strerror}; the source cannot be read") from error
        problem = f"cannot be read as {suffix[1:]} after row {after} ({_first_line(error)})"
        yield template._replace(first_row=after + 1, rows=1, kind="bad", payload=problem.encode())


def _check_end(path: Path, marks: tuple[bytes, ...]) -> None:
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, max(map(len, marks))), os.SEEK_END)
        if not file.read().endswith(marks):
            raise EOFError("its end is missing")


def _open_table(loader: str, path: Path) -> Any:
    options = {"batch_size": _TABLE_ROWS} if loader == "parquet" else {}
    return _datasets().load_dataset(loader, data_files=glob.escape(str(path)), split="train", streaming=True, **options)


def _table_pieces(rows: Any, template: Piece) -> Iterator[Piece]:
    """Records of an iterable dataset, only the columns that are asked for, as Arrow streams."""
    if known := rows.column_names:
        text_columns = {template.text_field, template.text_field.split(".")[0]}
        if not text_columns & set(known):
            raise ConfigError(
                f"{template.file}: has no column '{template.text_field}' (columns: {', '.join(known)}); set text_field"
            )
        rows = rows.select_columns([name for name in known if name in text_columns | {template.domain_field}])
    row = 1
    for table in rows.with_format("arrow").iter(batch_size=_TABLE_ROWS):
        for part in _halved(table):
            yield template._replace(first_row=row, rows=len(part), kind="table", payload=_serialized(part))
            row += len(part)


def _halved(table: Any) -> Iterator[Any]:
    if table.nbytes <= CHUNK or len(table) < 2:
        yield table
    else:
        middle = len(table) // 2
        yield from _halved(table.slice(0, middle))
        yield from _halved(table.slice(middle))


def _serialized(table: Any) -> bytes:
    import pyarrow as pa

    # As bytes: whether text is UTF-8 is found out for each document, not for a whole column.
    plain = [pa.binary() if pa.types.is_string(f.type) else f.type for f in table.schema]
    plain = [pa.large_binary() if pa.types.is_large_string(kind) else kind for kind in plain]
    schema = pa.schema([(name, kind) for name, kind in zip(table.column_names, plain, strict=True)])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(table.cast(schema))
    return bytes(sink.getvalue())


def _hub_streams(key: str, entry: DomainConfig, template: Piece) -> list[Stream]:
    name = entry.source.removeprefix(HUB)
    try:
        builder = _datasets().load_dataset_builder(name, entry.subset or None, revision=entry.revision)
        if builder.hash != entry.revision:  # it takes what is in its cache for want of what is asked for
            raise LookupError(f"there is no commit {entry.revision}, or no connection")
        if entry.streaming:
            rows = builder.as_streaming_dataset(split=entry.split)
        else:
            builder.download_and_prepare()
            rows = builder.as_dataset(split=entry.split)
            rows = rows.to_iterable_dataset(num_shards=min(max(rows.data.nbytes // _SHARD_BYTES, 1), max(len(rows), 1)))
        shards = int(rows.num_shards)
    except Exception as error:  # the hub, the network and the builders raise errors of many kinds
        raise ConfigError(f"{key}: {entry.source} cannot be opened ({_first_line(error)})") from error
    template = template._replace(file=entry.source)

    def stream(index: int) -> Stream:
        place = f"{entry.source}@{entry.revision} {entry.subset} {entry.split} shard {index} of {shards}"

        def pieces() -> Iterator[Piece]:
            labelled = template._replace(file=f"{entry.source} (shard {index})")
            try:
                yield from _table_pieces(rows.shard(shards, index), labelled)
            except ConfigError:
                raise
            except Exception as error:
                raise StorageError(
                    f"{key}: shard {index} of {entry.source} cannot be read ({_first_line(error)}); start again, "
                    "finished parts are kept"
                ) from error

        return Stream(place, pieces, 0, lambda: place, place, {})

    return [stream(index) for index in range(shards)]


def _local_python_pieces(template: Piece) -> Iterator[Piece]:
    template = template._replace(file=LOCAL_PYTHON, text_field="text", domain_field=template.domain_field and "domain")
    lines: list[str] = []
    size, row = 0, 1
    for text, domain in local_python_documents():
        lines.append(json.dumps({"text": text, "domain": domain}))
        size += len(lines[-1])
        if size >= CHUNK:
            yield template._replace(first_row=row, rows=len(lines), payload="\n".join(lines).encode())
            row += len(lines)
            lines, size = [], 0
    if lines:
        yield template._replace(first_row=row, rows=len(lines), payload="\n".join(lines).encode())


def _datasets() -> Any:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    return datasets


def _gone(key: str, path: str) -> CheckpointError:
    return CheckpointError(f"{key}: {path} is gone since the preparation began; restore it and start again")


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return (str(cause).splitlines() or [type(cause).__name__])[0][:300]
