"""Token files in megatron-core's indexed format (`.bin` tokens, `.idx` document borders), read. Its only importer."""

import importlib.util
import logging
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray


def _import_reader() -> Any:
    """megatron-core's reader of an `.idx`."""
    if "megatron.core" not in sys.modules:
        with suppress(ImportError, AttributeError):  # of a version that is put together otherwise: all of it, then
            return _import_reader_alone()
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():  # it warns about optional GPU packages that indexed files do not need
            warnings.simplefilter("ignore")
            from megatron.core.datasets.indexed_dataset import _IndexReader
    finally:
        logging.disable(level)
    return _IndexReader


def _import_reader_alone() -> Any:
    """The reader without the library around it.

    The package imports all of itself, and with it torch's compiler and W&B: three of the five seconds of CPU that a
    rank would take to start. The module of the reader needs none of that. So the packages above it are empty ones while
    it is imported, and gone afterwards: whoever imports megatron.core later gets the whole of it.
    """
    before = set(sys.modules)
    spec = importlib.util.find_spec("megatron")
    places = (spec and spec.submodule_search_locations) or []
    try:
        for name in ("core", "core.datasets"):
            package = sys.modules[f"megatron.{name}"] = ModuleType(f"megatron.{name}")
            package.__path__ = [str(Path(place, *name.split("."))) for place in places]
        # Of its utilities the reader wants one function, which has a module to itself.
        sys.modules["megatron.core.utils"] = importlib.import_module("megatron.core._rank_utils")
        return importlib.import_module("megatron.core.datasets.indexed_dataset")._IndexReader
    finally:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "megatron":
                del sys.modules[name]


_IndexReader = _import_reader()


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
