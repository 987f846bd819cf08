"""Near-duplicates: MinHash signatures of token shingles, and which documents follow one they resemble.

Shingles are of tokens, so no language needs rules of its own. Signatures are `rensa`'s R-MinHash (after Dahlgaard,
Knudsen & Thorup 2017, "Fast similarity sketching for text"); agreement of two signatures estimates the Jaccard
similarity of the shingle sets with a standard deviation below 1/sqrt(4 P). Only pairs that agree on a whole band of
values are compared (Leskovec, Rajaraman & Ullman, "Mining of massive datasets", chapter 3).

Shape letters: N documents in source order, P values of a signature, R values of a band.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

NUM_VALUES = 128
SHINGLE = 5
_SEED = 1
_RECALL = 0.95


def signature(ids: NDArray[np.integer]) -> NDArray[np.uint32]:
    """MinHash of a document's shingles, uint32 [P]. One shorter than a shingle is one shingle."""
    from rensa import RMinHash  # only where near-duplicates are looked for

    content, step = ids.tobytes(), ids.itemsize
    width = SHINGLE * step
    sketch = RMinHash(num_perm=NUM_VALUES, seed=_SEED)
    sketch.update([content[i : i + width] for i in range(0, max(len(content) - width, 0) + step, step)])
    return np.array(sketch.digest(), dtype=np.uint32)


def band_width(threshold: float) -> int:
    """Most values a band can have (fewest comparisons) such that a pair of this similarity is found 95 times of 100."""
    fitting = [
        width
        for width in range(1, NUM_VALUES + 1)
        if 1 - (1 - threshold**width) ** (NUM_VALUES // width) >= _RECALL or width == 1
    ]
    return max(fitting)


def followers(signatures_NP: NDArray[np.uint32], threshold: float) -> NDArray[np.bool_]:
    """Documents with an earlier one of estimated similarity >= threshold, bool [N].

    In each band a document is compared to the first and to the previous of those that share it, so that text repeated
    a million times costs two million comparisons. The array may be a memory map; about 40 bytes a document are held.
    """
    follows_N = np.zeros(len(signatures_NP), dtype=np.bool_)
    width = band_width(threshold)
    for start in range(0, NUM_VALUES - width + 1, width):
        keys_N = _band_keys(signatures_NP[:, start : start + width])
        order_N = np.argsort(keys_N, kind="stable")
        is_new_N = np.ones(len(order_N), dtype=np.bool_)
        is_new_N[1:] = keys_N[order_N[1:]] != keys_N[order_N[:-1]]
        firsts_N = order_N[np.maximum.accumulate(np.where(is_new_N, np.arange(len(order_N)), 0))]
        for index in np.flatnonzero(~is_new_N & ~follows_N[order_N]):
            earlier = {int(firsts_N[index]), int(order_N[index - 1])}
            document = int(order_N[index])
            follows_N[document] = any(
                similarity(signatures_NP[document], signatures_NP[other]) >= threshold for other in earlier
            )
    return follows_N


def similarity(first_P: Sequence[int] | NDArray[np.uint32], second_P: Sequence[int] | NDArray[np.uint32]) -> float:
    """Estimated Jaccard similarity: the share of values in which two signatures agree."""
    return float(np.mean(np.asarray(first_P) == np.asarray(second_P)))


def _band_keys(band_NR: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """A hash of each row; rows that differ may collide, which costs a comparison."""
    keys = np.zeros(len(band_NR), dtype=np.uint64)
    for column in band_NR.T:
        keys = (keys ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    return keys
