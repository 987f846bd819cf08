"""Files of text and of JSON lines, plain or compressed, as pieces. Their bytes are only cut at line ends here."""

import io
import lzma
from collections.abc import Iterator
from pathlib import Path

from trainer.data.documents import Piece

PACKED = (".gz", ".zst", ".bz2", ".xz")
CHUNK = 1 << 16
MAX_DOCUMENT_BYTES = 1 << 28
"""A line, or a text file, of more is no document but a mistake, and would not fit into memory many times over."""


def json_line_pieces(path: Path, template: Piece) -> Iterator[Piece]:
    """Whole lines, about CHUNK bytes a piece. `template` has the piece's other fields.

    Raises OSError if the file is gone or damaged, once all whole lines before that are out.
    """
    row, rest, is_oversized = 1, bytearray(), False
    for chunk in _chunks(path):
        if is_oversized:  # drop what is left of the line
            _, newline, chunk = chunk.partition(b"\n")
            if not newline:
                continue
            row, is_oversized = row + 1, False
        lines, newline, after = chunk.rpartition(b"\n")
        if newline:
            payload = bytes(rest) + lines
            rows = payload.count(b"\n") + 1
            yield template._replace(first_row=row, rows=rows, payload=payload)
            row, rest = row + rows, bytearray()
        rest += after
        if len(rest) > MAX_DOCUMENT_BYTES:
            yield _oversized(template, row)
            rest, is_oversized = bytearray(), True
    if rest:
        yield template._replace(first_row=row, rows=1, payload=bytes(rest))


def text_piece(path: Path, template: Piece) -> Iterator[Piece]:
    """The file as one document; nothing if it is empty."""
    content = bytearray()
    for chunk in _chunks(path):
        content += chunk
        if len(content) > MAX_DOCUMENT_BYTES:
            yield _oversized(template, 1)
            return
    if content:
        yield template._replace(first_row=1, rows=1, payload=bytes(content))


def _oversized(template: Piece, row: int) -> Piece:
    problem = f"row {row} has more than {MAX_DOCUMENT_BYTES >> 20} MiB; split it into documents"
    return template._replace(first_row=row, rows=1, kind="bad", payload=problem.encode())


def _chunks(path: Path) -> Iterator[bytes]:
    with _open(path) as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _open(path: Path) -> io.BufferedIOBase:
    import pyarrow as pa

    if path.suffix == ".xz":
        return lzma.open(path)
    compression = "detect" if path.suffix in PACKED else None
    # Buffered: pieces must not depend on how many bytes a decompressor happens to return.
    return io.BufferedReader(pa.input_stream(str(path), compression=compression), CHUNK)
