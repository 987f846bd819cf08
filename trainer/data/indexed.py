"""Token files in megatron-core's indexed format (`.bin` tokens, `.idx` document borders). Its only importer."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

with warnings.catch_warnings():  # it warns about optional GPU packages that indexed files do not need
    warnings.simplefilter("ignore")
    _level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder, _IndexReader

    logging.disable(_level)


class ShardWriter:
    """Writes one indexed dataset, a document at a time."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self._prefix = prefix
        self._builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
        self.documents = 0
        self.tokens = 0

    def add(self, tokens: Sequence[int]) -> None:
        """Append one document."""
        self._builder.add_document(torch.tensor(tokens, dtype=torch.int64), [len(tokens)])
        self.documents += 1
        self.tokens += len(tokens)

    def close(self) -> None:
        """Write the index; the dataset is readable from here on."""
        self._builder.finalize(f"{self._prefix}.idx")


def open_tokens(prefix: Path) -> NDArray[np.integer]:
    """All tokens of an indexed dataset as one read-only memory map: its documents lie end to end in the `.bin`."""
    dtype = _IndexReader(f"{prefix}.idx", multimodal=False).dtype
    if Path(f"{prefix}.bin").stat().st_size == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(f"{prefix}.bin", dtype=dtype, mode="r")
