"""Which text is sample i: a pure function of the seed and i, for ever.

There is no list of samples to shuffle. Sample i lies in block i // 4096; a block holds a fixed quota of each domain
in an order drawn for that block; the n-th sample of a domain is row n of the domain's current epoch, in an order
drawn for that epoch. All orders are keyed permutations that are computed, not stored, so a jump to any sample costs
nothing, and neither ranks, workers nor the length of the run can change what sample i is.

Shape letters: S samples asked for, D domains.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BLOCK = 4096
"""Samples in a block; a domain's share is exact in every block to 1/4096."""

_ROUND_CONSTANTS = [np.uint64(round_number * 0x9E3779B97F4A7C15 % 2**64) for round_number in range(6)]
Integers = NDArray[np.int64]


def block_quotas(weights_D: Sequence[float]) -> Integers:
    """Samples of each domain in a block, int64 [D], summing to BLOCK: largest remainders, 1 or more if weight > 0."""
    weights = np.asarray(weights_D, dtype=np.float64)
    exact = weights / weights.sum() * BLOCK
    quotas = np.where(weights > 0, np.maximum(np.floor(exact), 1), 0).astype(np.int64)
    missing = BLOCK - int(quotas.sum())
    if missing > 0:
        by_remainder = np.argsort(quotas - exact, kind="stable")
        quotas[by_remainder[weights[by_remainder] > 0][:missing]] += 1
    else:  # tiny domains were raised to one: the largest pays for them
        quotas[quotas.argmax()] += missing
    return quotas


def locate(samples_S: Integers, *, quotas_D: Integers, rows_D: Integers, seed: int) -> tuple[Integers, Integers]:
    """Domain and row of each sample, both int64 [S]. `rows_D`: rows a domain has, not 0 where its quota is not."""
    blocks_S, positions_S = np.divmod(samples_S, BLOCK)
    slots_S = permute(positions_S, size=BLOCK, keys=_key(seed, 0, blocks_S))
    ends_D = np.cumsum(quotas_D)
    domains_S = np.searchsorted(ends_D, slots_S, side="right").astype(np.int64)
    visits_S = blocks_S * quotas_D[domains_S] + slots_S - (ends_D - quotas_D)[domains_S]
    rows_S = np.empty_like(visits_S)
    for domain in np.unique(domains_S):
        chosen = domains_S == domain
        epochs, positions = np.divmod(visits_S[chosen], rows_D[domain])
        rows_S[chosen] = permute(positions, size=int(rows_D[domain]), keys=_key(seed, 1 + int(domain), epochs))
    return domains_S, rows_S


def permute(positions_S: Integers, *, size: int, keys: NDArray[np.uint64]) -> Integers:
    """Where a keyed permutation of range(size) sends each position, int64 [S]; one key for each position.

    A Feistel network permutes the next power of four; what lands outside range(size) is sent on until it lands
    inside (cycle walking; Black & Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    values = positions_S.astype(np.uint64)
    pending = np.arange(values.size)
    while pending.size:
        left, right = values[pending] >> shift, values[pending] & mask
        for constant in _ROUND_CONSTANTS:
            mixed = _splitmix64(keys[pending] + right + constant)
            left, right = right, left ^ (mixed & mask)
        values[pending] = left << shift | right
        pending = pending[values[pending] >= np.uint64(size)]
    return values.astype(np.int64)


def _key(seed: int, stream: int, counters_S: Integers) -> NDArray[np.uint64]:
    base = _splitmix64(np.array([seed], dtype=np.uint64)) + np.uint64(stream)
    return _splitmix64(_splitmix64(base) + counters_S.astype(np.uint64))


def _splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014), elementwise modulo 2^64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
