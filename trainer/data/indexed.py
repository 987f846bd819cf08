"""Token files in megatron-core's indexed format (`.bin` tokens, `.idx` document borders), read. Its only importer."""

import logging
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

with warnings.catch_warnings():  # it warns about optional GPU packages that indexed files do not need
    warnings.simplefilter("ignore")
    _level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    from megatron.core.datasets.indexed_dataset import _IndexReader

    logging.disable(_level)


class IndexedTokens:
    """All tokens of an indexed dataset as one read-only memory map: its documents lie end to end in the `.bin`."""

    def __init__(self, prefix: Path) -> None:
        self._reader = _IndexReader(f"{prefix}.idx", multimodal=False)  # closes its map when it goes
        is_empty = Path(f"{prefix}.bin").stat().st_size == 0
        dtype = self._reader.dtype
        self.tokens: NDArray[np.integer] = (
            np.empty(0, dtype) if is_empty else np.memmap(f"{prefix}.bin", dtype=dtype, mode="r")
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self._reader.sequence_pointers)

    def document_starts(self) -> NDArray[np.int64]:
        """First token of each document, int64, a copy."""
        starts: NDArray[np.int64] = self._reader.sequence_pointers // self.tokens.itemsize
        return starts

    def documents(self, start: int, stop: int) -> NDArray[np.int64]:
        """Number of the document that each of the tokens [start, stop) belongs to."""
        # The index holds byte offsets; a search in it touches a few pages of a file that may be larger than memory.
        pointers = self._reader.sequence_pointers
        first, last = np.searchsorted(pointers, np.array([start, stop - 1]) * self.tokens.itemsize, side="right") - 1
        borders = pointers[first : last + 1] // self.tokens.itemsize
        borders[0] = start
        found: NDArray[np.int64] = np.repeat(np.arange(first, last + 1), np.diff(np.append(borders, stop)))
        return found
