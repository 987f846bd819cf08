"""Which documents of all parts are copies of earlier ones, or nearly.

The first in source order stays, so the outcome depends neither on workers nor on what was resumed. Nothing here needs
memory in proportion to the text: digests (24 bytes a document with its number) are dealt out to files by their value,
copies of a text meet in one file, and one file of at most about 64 MiB is looked at a time.

Shape letters: N documents of a part, P MinHash values.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data.near_duplicates import NUM_VALUES, followers
from trainer.data.parts import Part, load_part

KEPT, DUPLICATE, NEAR_DUPLICATE = 0, 1, 2
_BUCKET_BYTES = 1 << 26
_MAX_BUCKETS = 256  # files open at once
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<i8")])


def first_places(parts: Sequence[Part]) -> list[int]:
    """Place of each part's first row, where rows of all parts are numbered in source order; and the number of rows."""
    places = [0]
    for part in parts:
        places.append(places[-1] + part.rows)
    return places


def judge(
    parts: Sequence[Part],
    folder: Path,
    scratch: Path,
    *,
    near_duplicates: float,
    bucket_bytes: int = _BUCKET_BYTES,
) -> Path:
    """Write KEPT, DUPLICATE or NEAR_DUPLICATE for every row of the parts, a byte each; returns the file.

    `scratch`: an empty folder for that and for intermediate files.
    """
    places = first_places(parts)
    path = scratch / "verdicts"
    with path.open("wb") as file:
        file.truncate(max(places[-1], 1))
    verdicts: NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r+")
    num_buckets = min(_MAX_BUCKETS, -(-places[-1] * _RECORD.itemsize // bucket_bytes) or 1)
    for bucket in _deal(parts, places, folder, scratch, num_buckets):
        verdicts[_copies(bucket)] = DUPLICATE
    if near_duplicates:
        _judge_near(parts, places, folder, scratch, verdicts, near_duplicates)
    return path


def _deal(
    parts: Sequence[Part], places: Sequence[int], folder: Path, scratch: Path, num_buckets: int
) -> Iterator[NDArray[np.void]]:
    """Records of all documents, copies of a text in one array."""
    paths = [scratch / f"digests-{bucket}" for bucket in range(num_buckets)]
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        for part, first in zip(parts, places, strict=False):
            records = _records(part, first, folder)
            buckets = (records["high"] >> np.uint64(32)) * np.uint64(num_buckets) >> np.uint64(32)
            order = np.argsort(buckets, kind="stable")
            ends = np.searchsorted(buckets[order], np.arange(num_buckets + 1))
            for file, begin, end in zip(files, ends[:-1], ends[1:], strict=True):
                if begin < end:
                    file.write(records[order[begin:end]].tobytes())
    for path in paths:
        yield np.frombuffer(path.read_bytes(), dtype=_RECORD)
        path.unlink()


def _records(part: Part, first: int, folder: Path) -> NDArray[np.void]:
    digest, position_N = load_part(folder, part, "digest", "position")
    values = digest.view(">u8").reshape(-1, 2)
    records = np.empty(len(values), dtype=_RECORD)
    records["high"], records["low"] = values[:, 0], values[:, 1]
    records["place"] = first + position_N
    return records


def _copies(records: NDArray[np.void]) -> NDArray[np.int64]:
    """Places of all but the first of equal digests."""
    ordered = records[np.lexsort((records["place"], records["low"], records["high"]))]
    is_copy = np.zeros(len(ordered), dtype=np.bool_)
    is_copy[1:] = (ordered["high"][1:] == ordered["high"][:-1]) & (ordered["low"][1:] == ordered["low"][:-1])
    copies: NDArray[np.int64] = ordered["place"][is_copy]
    return copies


def _judge_near(
    parts: Sequence[Part],
    places: Sequence[int],
    folder: Path,
    scratch: Path,
    verdicts: NDArray[np.uint8],
    threshold: float,
) -> None:
    """Compare the signatures of what is left, in source order."""
    path = scratch / "signatures"
    numbers: list[NDArray[np.int64]] = []
    with path.open("wb") as file:
        for part, first in zip(parts, places, strict=False):
            position_N, signature_NP = load_part(folder, part, "position", "signature")
            order_N = np.argsort(position_N)
            found_N = first + position_N[order_N]
            is_left_N = verdicts[found_N] == KEPT
            file.write(signature_NP[order_N][is_left_N].tobytes())
            numbers.append(found_N[is_left_N])
    places_N = np.concatenate([np.empty(0, np.int64), *numbers])
    if len(places_N):
        signatures_NP = np.memmap(path, dtype=np.uint32, mode="r").reshape(-1, NUM_VALUES)
        verdicts[places_N[followers(signatures_NP, threshold)]] = NEAR_DUPLICATE
    path.unlink()
