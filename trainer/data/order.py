"""Which text is sample i: a pure function of the seed, the phases and i, for ever.

There is no list of samples to shuffle. A phase is a mixture of domains that holds from one sample on. It is cut into
blocks; a block has a fixed quota of each domain, in an order drawn for that block. Samples of a domain are numbered as
they come, through all phases: its n-th visit is row n of the domain's current epoch, in an order drawn for that epoch.
So at every moment the rows of a domain differ by one visit at most. All orders are keyed permutations that are
computed, not stored: a jump to any sample costs one block, and neither ranks, workers nor the length of the run can
change what sample i is.

Shape letters: S samples asked for, D domains, X samples of a block.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ORDER = 2
"""Version of the order: a checkpoint of another one was trained on other data. (1 counted visits by place in the
shuffle, so that inside a block rows of two epochs mixed.)"""

BLOCK = 4096
"""Samples in a block; a domain's share is exact in every block to 1/4096."""

_ROUND_CONSTANTS = [np.uint64(round_number * 0x9E3779B97F4A7C15 % 2**64) for round_number in range(6)]
Integers = NDArray[np.int64]


class Phase(NamedTuple):
    """A mixture, from one sample on."""

    start: int
    """First sample."""
    quotas_D: tuple[int, ...]
    """Samples of each domain in a block; they sum to the size of the block, not 0 where the domain has no row."""
    visits_D: tuple[int, ...]
    """Samples that each domain gave before this phase."""


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


def locate(
    samples_S: Integers, phases: Sequence[Phase], *, rows_D: Sequence[int], seed: int
) -> tuple[Integers, Integers]:
    """Domain and row of each sample, both int64 [S]. `phases`: by rising start, the first one not after any sample."""
    domains_S, visits_S = np.empty_like(samples_S), np.empty_like(samples_S)
    which_S = np.searchsorted([phase.start for phase in phases], samples_S, side="right") - 1
    for number in np.unique(which_S):
        chosen = which_S == number
        domains_S[chosen], visits_S[chosen] = _visits(samples_S[chosen], phases[number], seed)
    sizes_S = np.asarray(rows_D, dtype=np.int64)[domains_S]
    epochs_S, positions_S = np.divmod(visits_S, sizes_S)
    rows_S = permute(positions_S, size=sizes_S, keys=_key(seed, 1 + domains_S, epochs_S))
    return domains_S, rows_S


def visits_before(sample: int, phase: Phase, *, seed: int) -> tuple[int, ...]:
    """Samples each domain has given before `sample`, which lies in the phase or is the first after it."""
    block, position = divmod(sample - phase.start, sum(phase.quotas_D))
    order = _block(seed, phase.start + block, phase.quotas_D)
    begun_D = np.bincount(order.domains_X[:position], minlength=len(phase.quotas_D)).tolist()
    return tuple(
        before + block * quota + begun
        for before, quota, begun in zip(phase.visits_D, phase.quotas_D, begun_D, strict=True)
    )


def sample_of_visit(domain: int, visit: int, phase: Phase, *, seed: int) -> int:
    """The sample that is a domain's visit with this number, from 0, if the phase goes on for long enough."""
    block, nth = divmod(visit - phase.visits_D[domain], phase.quotas_D[domain])
    order = _block(seed, phase.start + block, phase.quotas_D)
    position = int(np.flatnonzero(order.domains_X == domain)[nth])
    return phase.start + block * sum(phase.quotas_D) + position


def sample_digests(samples_S: Integers, domains_S: Integers, rows_S: Integers) -> Integers:
    """32 bits of each (sample, domain, row), int64 [S]: sums of them tell whether two sets of samples are the same."""
    mixed = _splitmix64(samples_S.astype(np.uint64))
    for values_S in (domains_S, rows_S):
        mixed = _splitmix64(mixed + values_S.astype(np.uint64))
    return (mixed >> np.uint64(32)).astype(np.int64)


class _Order(NamedTuple):
    """One block: the domain of each sample, and how many samples of that domain come before it in the block."""

    domains_X: NDArray[np.uint16]
    nth_X: Integers


@lru_cache(maxsize=64)
def _block(seed: int, counter: int, quotas_D: tuple[int, ...]) -> _Order:
    size = sum(quotas_D)
    slots_X = permute(np.arange(size), size=size, keys=np.broadcast_to(_key(seed, 0, np.array([counter])), (size,)))
    of_slots_X = np.repeat(np.arange(len(quotas_D), dtype=np.uint16), quotas_D)  # a domain has consecutive slots
    domains_X = of_slots_X[slots_X]
    nth_X = np.empty(size, dtype=np.int64)
    begins_D = np.cumsum(quotas_D) - quotas_D
    nth_X[np.argsort(domains_X, kind="stable")] = np.arange(size) - begins_D[of_slots_X]
    return _Order(domains_X, nth_X)


def _visits(samples_S: Integers, phase: Phase, seed: int) -> tuple[Integers, Integers]:
    """Domain of each sample of a phase, and the number of its visit to the domain, both int64 [S]."""
    blocks_S, positions_S = np.divmod(samples_S - phase.start, sum(phase.quotas_D))
    domains_S, visits_S = np.empty_like(samples_S), np.empty_like(samples_S)
    quotas_D, before_D = np.array(phase.quotas_D), np.array(phase.visits_D)
    by_block = np.argsort(blocks_S, kind="stable")
    blocks, begins = np.unique(blocks_S[by_block], return_index=True)
    for block, chosen in zip(blocks.tolist(), np.split(by_block, begins[1:]), strict=True):
        # Before the next phase starts, this one has begun fewer blocks than it has samples: no two share a counter.
        order = _block(seed, phase.start + block, phase.quotas_D)
        domains_S[chosen] = domains = order.domains_X[positions_S[chosen]].astype(np.int64)
        visits_S[chosen] = before_D[domains] + block * quotas_D[domains] + order.nth_X[positions_S[chosen]]
    return domains_S, visits_S


def permute(positions_S: Integers, *, size: int | Integers, keys: NDArray[np.uint64]) -> Integers:
    """Where a keyed permutation of range(size) sends each position, int64 [S]; one key, and size, for each position.

    A Feistel network permutes the next power of four; what lands outside range(size) is sent on until it lands
    inside (cycle walking; Black & Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    sizes_S = np.broadcast_to(np.asarray(size, dtype=np.int64), positions_S.shape)
    bits_S = np.frexp(np.maximum(sizes_S - 1, 1).astype(np.float64))[1]  # bit lengths: rows are fewer than 2^53
    shifts_S = ((bits_S + 1) // 2).astype(np.uint64)
    masks_S = (np.uint64(1) << shifts_S) - np.uint64(1)
    values = positions_S.astype(np.uint64)
    pending = np.arange(values.size)
    while pending.size:
        shift, mask, key = shifts_S[pending], masks_S[pending], keys[pending]
        left, right = values[pending] >> shift, values[pending] & mask
        for constant in _ROUND_CONSTANTS:
            mixed = _splitmix64(key + right + constant)
            left, right = right, left ^ (mixed & mask)
        values[pending] = moved = left << shift | right
        pending = pending[moved >= sizes_S[pending].astype(np.uint64)]
    return values.astype(np.int64)


def _key(seed: int, stream: int | Integers, counters_S: Integers) -> NDArray[np.uint64]:
    base = _splitmix64(np.array([seed], dtype=np.uint64)) + np.asarray(stream).astype(np.uint64)
    return _splitmix64(_splitmix64(base) + counters_S.astype(np.uint64))


def _splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014), elementwise modulo 2^64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
