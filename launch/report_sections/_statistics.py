"""Differences between variants of a grid, from runs paired by their seed. Pure functions of numbers.

Shape letter: N paired seeds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from launch.report_sections._record import Floats

LEVEL = 0.95
RESAMPLES = 9999


@dataclass(frozen=True)
class Difference:
    """Variant minus baseline, over the seeds that both have."""

    values_N: Floats
    mean: float
    t_interval: tuple[float, float] | None
    """Exact if differences are normal; None for fewer than two."""
    bootstrap: tuple[float, float] | None
    """Percentile interval; None for fewer than two."""
    p: float | None
    """Of the paired t test, two-sided; None if it cannot be made."""
    p_holm: float | None = None
    """After Holm's correction over the family; set by `compare`."""

    @property
    def is_shown(self) -> bool:
        """Whether the difference stands at the 5 % level after correction."""
        return self.p_holm is not None and self.p_holm < 1 - LEVEL


def difference(values_N: Sequence[float]) -> Difference:
    """Mean, intervals and p of paired differences."""
    from scipy import stats

    d_N = np.asarray(values_N, dtype=np.float64)
    mean = float(d_N.mean())
    if len(d_N) < 2:
        return Difference(d_N, mean, None, None, None)
    if np.ptp(d_N) <= 1e-12 * max(1.0, float(np.abs(d_N).max())):  # the same to the last bits: nothing to resample
        return Difference(d_N, mean, (mean, mean), (mean, mean), None)
    test = stats.ttest_1samp(d_N, 0.0)
    t_interval = test.confidence_interval(LEVEL)
    resampled = stats.bootstrap(
        (d_N,), np.mean, n_resamples=RESAMPLES, confidence_level=LEVEL, method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return Difference(
        d_N, mean, (float(t_interval.low), float(t_interval.high)), (float(resampled.low), float(resampled.high)),
        float(test.pvalue),
    )  # fmt: skip


def compare(values: Mapping[str, Mapping[int, float]], baseline: str) -> dict[str, Difference]:
    """Each variant against the baseline; `values`: a figure by variant and seed. One family for Holm's correction.

    A variant without a seed in common with the baseline is left out.
    """
    base, found = values.get(baseline, {}), {}
    for variant, by_seed in values.items():
        seeds = sorted(by_seed.keys() & base.keys())
        if variant != baseline and seeds:
            found[variant] = difference([by_seed[seed] - base[seed] for seed in seeds])
    tested = [variant for variant, each in found.items() if each.p is not None]
    adjusted = holm([found[variant].p or 0.0 for variant in tested])
    for variant, p in zip(tested, adjusted, strict=True):
        found[variant] = replace(found[variant], p_holm=p)
    return found


def holm(ps: Sequence[float]) -> list[float]:
    """p values adjusted by Holm's step-down method (Holm 1979): they hold the family-wise error rate."""
    order = sorted(range(len(ps)), key=ps.__getitem__)
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = largest
    return adjusted


def first_reached(x: Floats, y: Floats, target: float) -> float | None:
    """Where a falling curve first comes to `target`, linearly between its points; None if it never does."""
    below = np.flatnonzero(y <= target)
    if not len(below):
        return None
    i = int(below[0])
    if i == 0:
        return float(x[0])
    part = (y[i - 1] - target) / (y[i - 1] - y[i])
    return float(x[i - 1] + part * (x[i] - x[i - 1]))


def what_can_be_said(pairs: int, comparisons: int) -> str:
    """What so many paired seeds allow to conclude, in words."""
    if pairs < 2:
        return (
            "One seed: there is no interval and no test. A difference between two runs of one seed may be noise; "
            "run at least three seeds."
        )
    least = 2 / 2**pairs
    covered = 1 - 2 ** (1 - pairs)
    distinct = math.comb(2 * pairs - 1, pairs)
    words = (
        f"{pairs} paired seeds: the t interval and its test are exact if differences between seeds are normal, "
        f"which {pairs} values cannot show. The bootstrap assumes less and claims more than it can: it has "
        f"{distinct:,} distinct resamples and lies within the least and largest difference, so it holds the true "
        f"one at most {100 * covered:.3g} % of the time, not 95 %. A test without the assumption (flipping signs) "
        f"cannot go below p = {least:.2g}."
    )
    if least > 1 - LEVEL:
        words += " So read a small p here as a reason to run more seeds, not as proof."
    if comparisons > 1:
        words += f" p (Holm) is corrected for the {comparisons} comparisons of this table, not for the other tables."
    return words
