"""Pieces of source files and the documents in them. Cutting a file into pieces is cheap and done by one process;
parsing them is done by all workers, so this file imports nothing heavy.
"""

import json
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from trainer.data.mixture import domain_name_problem


class Document(NamedTuple):
    """One text of one domain."""

    text: str
    domain: str


class Piece(NamedTuple):
    """Consecutive documents of one file, not parsed yet."""

    file: str
    first_row: int
    """Number of its first row in the file, from 1: a line of a text format, else a record."""
    rows: int
    """How many rows it has."""
    kind: Literal["json_lines", "text", "table", "bad"]
    payload: bytes
    """Lines of JSON, one whole text, an Arrow stream of records, or what is wrong with the file from here on."""
    text_field: str
    domain_field: str
    """Empty: all documents are of `domain`."""
    domain: str
    """Domain of documents that name none."""


class BadDocument(NamedTuple):
    """What is wrong with a row, in words that begin with its place."""

    problem: str
    domain: str


def parse(piece: Piece) -> Iterator[Document | BadDocument]:
    """The documents of a piece, in order. Text is valid Unicode; its length is not looked at."""
    if piece.kind == "bad":
        yield BadDocument(f"{piece.file}: {piece.payload.decode()}", piece.domain)
    elif piece.kind == "text":
        yield _document(piece, piece.first_row, piece.payload, None)
    elif piece.kind == "json_lines":
        for row, line in enumerate(piece.payload.split(b"\n"), start=piece.first_row):
            if line.strip():
                yield _parse_line(piece, row, line)
    else:
        for row, record in enumerate(_records(piece.payload), start=piece.first_row):
            yield _from_record(piece, row, record)


def _parse_line(piece: Piece, row: int, line: bytes) -> Document | BadDocument:
    try:
        record = json.loads(line.decode("utf-8-sig" if row == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return _not_utf8(piece, row, error)
    except (ValueError, RecursionError) as error:
        return BadDocument(f"{piece.file}: row {row} cannot be read as json ({error})", piece.domain)
    if not isinstance(record, dict):
        return BadDocument(f"{piece.file}: row {row} is a JSON {type(record).__name__}, not an object", piece.domain)
    return _from_record(piece, row, record)


def _records(payload: bytes) -> Iterator[dict[str, Any]]:
    import pyarrow as pa  # only workers that read tables pay for it

    with pa.ipc.open_stream(payload) as reader:
        for batch in reader:
            yield from batch.to_pylist()


def _from_record(piece: Piece, row: int, record: dict[str, Any]) -> Document | BadDocument:
    found, text = _look_up(record, piece.text_field)
    if not found:
        fields = ", ".join(map(str, record))[:200]
        return BadDocument(
            f"{piece.file}: row {row} has no field '{piece.text_field}' (fields: {fields}); set text_field",
            piece.domain,
        )
    domain = record.get(piece.domain_field) if piece.domain_field else None
    return _document(piece, row, text, domain)


def _look_up(record: dict[str, Any], field: str) -> tuple[bool, Any]:
    """A column, or a field of a nested one; a column whose own name has dots wins."""
    if field in record:
        return True, record[field]
    column, _, rest = field.partition(".")
    inner = record.get(column)
    return _look_up(inner, rest) if rest and isinstance(inner, dict) else (False, None)


def _document(piece: Piece, row: int, text: object, domain: object) -> Document | BadDocument:
    try:
        name = piece.domain if domain is None else domain.decode() if isinstance(domain, bytes) else str(domain)
        if isinstance(text, bytes):
            text = text.decode()
        elif isinstance(text, str):
            text.encode()  # JSON can hold half of a surrogate pair
    except UnicodeDecodeError as error:
        return _not_utf8(piece, row, error)
    except UnicodeEncodeError as error:
        place = f"{piece.file}: row {row}"
        return BadDocument(f"{place}: field '{piece.text_field}' is not Unicode text ({error.reason})", piece.domain)
    if not isinstance(text, str):
        kind = type(text).__name__
        return BadDocument(f"{piece.file}: row {row}: field '{piece.text_field}' holds {kind}, not text", piece.domain)
    if problem := domain_name_problem(name):
        if domain is None:
            field = f"no field '{piece.domain_field}'" if piece.domain_field else "no domain of its own"
            problem = (
                f"has {field}, so its domain is called after the file, but {problem}; or list the file in data.domains"
            )
        return BadDocument(f"{piece.file}: row {row}: {problem}", piece.domain)
    return Document(text, name)


def _not_utf8(piece: Piece, row: int, error: UnicodeDecodeError) -> BadDocument:
    return BadDocument(
        f"{piece.file}: row {row} is not UTF-8 text (byte {error.start}: {error.reason}); convert or remove it",
        piece.domain,
    )
