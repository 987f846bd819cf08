"""How documents share rows: cut from one stream, or packed whole.

`split` lays the documents of a shard end to end; row j takes T tokens from token jT on. No row of training text has
padding, but documents are cut wherever a row ends.

`best_fit` cuts only documents longer than a row. What remains of each goes, longest first, into the row with the least
space that still holds it (best-fit decreasing; Ding et al. 2024, arXiv 2404.10830). No target crosses documents then,
so a document of n tokens takes n - 1 places: its last token is only a target.

Both are functions of the documents' lengths and T alone.

Shape letters: N documents, P pieces, R rows, T sequence.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.integer]


class Span(NamedTuple):
    """Inputs of a row that follow each other in the stream; targets are the same, shifted by one token."""

    start: int
    stop: int


class Pieces(NamedTuple):
    """All spans of a shard, in the order of the text."""

    starts_P: Integers
    stops_P: Integers
    rows_P: Integers


class Packing(Protocol):
    """Which tokens of a shard's stream make each row."""

    @property
    def num_rows(self) -> int:
        """Rows of the shard."""
        ...

    def spans(self, row: int) -> list[Span]:
        """Spans of a row, in the order they stand in it."""
        ...

    def pieces(self) -> Pieces:
        """Spans of all rows at once."""
        ...

    def most_documents(self, starts_N: Integers) -> int:
        """Most documents that share a row; `starts_N` says where the documents of the stream begin."""
        ...


@dataclass(frozen=True)
class SplitPacking:
    """Consecutive windows. `partial`: whether what is left at the end makes one more, shorter row."""

    num_tokens: int
    length: int
    partial: bool

    @property
    def num_rows(self) -> int:
        targets = max(0, self.num_tokens - 1)
        return -(-targets // self.length) if self.partial else targets // self.length

    def spans(self, row: int) -> list[Span]:
        return [Span(row * self.length, min((row + 1) * self.length, self.num_tokens - 1))]

    def pieces(self) -> Pieces:
        rows = np.arange(self.num_rows)
        starts = rows * self.length
        return Pieces(starts, np.minimum(starts + self.length, self.num_tokens - 1), rows)

    def most_documents(self, starts_N: Integers) -> int:
        # As many as begin in the row, and the one that began before it.
        begins_R = np.unique(np.asarray(starts_N) // self.length, return_counts=True)[1]
        return min(int(begins_R.max(initial=0)) + 1, self.length)


@dataclass(frozen=True)
class BestFitPacking:
    """Rows of whole documents, in compressed form: the pieces of row r are [offsets[r], offsets[r + 1])."""

    offsets: Integers  # int64 [R + 1]
    starts_P: Integers  # int64, token of the stream
    lengths_P: Integers  # int32, inputs

    @property
    def num_rows(self) -> int:
        return len(self.offsets) - 1

    def spans(self, row: int) -> list[Span]:
        chosen = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        pieces = zip(self.starts_P[chosen].tolist(), self.lengths_P[chosen].tolist(), strict=True)
        return [Span(start, start + length) for start, length in pieces]

    def pieces(self) -> Pieces:
        order = np.argsort(self.starts_P, kind="stable")
        rows_P = np.repeat(np.arange(self.num_rows), np.diff(self.offsets))
        return Pieces(self.starts_P[order], (self.starts_P + self.lengths_P)[order], rows_P[order])

    def most_documents(self, starts_N: Integers) -> int:
        return int(np.diff(self.offsets).max(initial=1))


def pack_best_fit(starts_N: Integers, num_tokens: int, length: int) -> BestFitPacking:
    """Pack the documents that start at these tokens of a stream of `num_tokens` into rows of `length`."""
    places_N = np.diff(np.append(starts_N, num_tokens)).astype(np.int64) - 1
    full_N, rest_N = np.divmod(np.maximum(places_N, 0), length)
    # Full rows first, in the order of the text.
    owners = np.repeat(np.arange(len(starts_N)), full_N)
    nth = np.arange(len(owners)) - np.repeat(np.cumsum(full_N) - full_N, full_N)
    full_starts = starts_N[owners] + nth * length
    remains = np.flatnonzero(rest_N)
    rows = best_fit_decreasing(rest_N[remains], length)
    starts_P = np.concatenate([full_starts, starts_N[remains] + full_N[remains] * length]).astype(np.int64)
    lengths_P = np.concatenate([np.full(len(owners), length), rest_N[remains]]).astype(np.int32)
    rows_P = np.concatenate([np.arange(len(owners)), len(owners) + rows])
    # Pieces of a row stand in the order of the text.
    order = np.lexsort((starts_P, rows_P))
    num_rows = int(rows_P.max()) + 1 if len(rows_P) else 0
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows_P, minlength=num_rows))]).astype(np.int64)
    return BestFitPacking(offsets, starts_P[order], lengths_P[order])


def best_fit_decreasing(sizes_P: Integers, capacity: int) -> NDArray[np.int64]:
    """The bin of each item, int64 [P]: items by falling size, each into the fullest bin that still holds it.

    Items of one size and bins of one remaining space are alike, so they are placed together: the work grows with the
    number of different sizes, not with the number of items.
    """
    bins_P = np.empty(len(sizes_P), dtype=np.int64)
    if not len(sizes_P):
        return bins_P
    assert 0 < sizes_P.min() <= sizes_P.max() <= capacity
    by_size = np.argsort(sizes_P, kind="stable")
    sizes, firsts = np.unique(sizes_P[by_size], return_index=True)
    num_bins = 0
    open_bins: dict[int, list[NDArray[np.int64]]] = {}  # by remaining space
    spaces: list[int] = []  # the keys of open_bins in rising order

    def leave_open(bins: NDArray[np.int64], space: int) -> None:
        if len(bins) and space:
            if space not in open_bins:
                open_bins[space] = []
                insort(spaces, space)
            open_bins[space].append(bins)

    for size, items in zip(sizes[::-1].tolist(), np.split(by_size, firsts[1:])[::-1], strict=True):
        while len(items):
            fitting = bisect_left(spaces, size)
            if fitting < len(spaces):
                space = spaces[fitting]
                chosen = open_bins[space].pop()
                if not open_bins[space]:
                    del open_bins[space], spaces[fitting]
            else:
                space = capacity
                chosen = np.arange(num_bins, num_bins - (-len(items) // (capacity // size)))
                num_bins += len(chosen)
            # A bin is filled until it holds no further item of this size, for until then it is the fullest that does.
            per_bin = space // size
            taken = np.repeat(chosen[: -(-len(items) // per_bin)], per_bin)[: len(items)]
            bins_P[items[: len(taken)]] = taken
            filled, in_last = divmod(len(taken), per_bin)
            leave_open(chosen[:filled], space - per_bin * size)
            leave_open(chosen[filled : filled + (in_last > 0)], space - in_last * size)
            leave_open(chosen[filled + (in_last > 0) :], space)
            items = items[len(taken) :]
    return bins_P
