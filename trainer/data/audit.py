"""How often each row and document is seen, counted sample by sample, against what was planned and what was recorded.

Nothing here trusts the arithmetic of a plan: every sample is located and counted. What it is held against are the
shares of each phase, the rule that rows of a domain differ by one visit at most, the caps, and the digest that every
training step recorded of the rows it was really given.

Shape letters: D domains, R rows, N documents, P pieces.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data.order import BLOCK, Integers, sample_digests
from trainer.data.packing import Pieces
from trainer.data.plan import PhaseRecord, SamplePlan

_CHUNK = 1 << 18


class PhaseCount(NamedTuple):
    """One domain in one phase."""

    phase: PhaseRecord
    domain: int
    samples: int
    """Samples of the phase, all domains."""
    planned: float
    """Its share of them."""
    counted: int
    tolerance: float
    """How far the two may be apart: the phase may end within a block."""


@dataclass
class Audit:
    """Counts of the samples [0, stop) of a plan."""

    plan: SamplePlan
    stop: int
    visits: list[NDArray[np.int32]]
    """Visits of each row, by domain, [R]."""
    phases: list[PhaseCount]
    digests: Integers
    """Digest of each whole step."""

    @classmethod
    def of(cls, plan: SamplePlan, stop: int, *, global_batch_size: int) -> "Audit":
        """Locate and count every sample before `stop`. Raises ConfigError if the plan ends before."""
        plan.require(stop)
        visits = [np.zeros(rows, dtype=np.int32) for rows in plan.rows_D]
        phases = []
        sums = np.zeros(-(-stop // global_batch_size) or 1, dtype=np.int64)
        records = plan.phases(stop)
        for phase, end in zip(records, [*(each.start for each in records[1:]), stop], strict=True):
            counted_D = np.zeros(len(plan.rows_D), dtype=np.int64)
            for samples_S in _chunks(phase.start, end):
                domains_S, rows_S = plan.locate(samples_S)
                counted_D += np.bincount(domains_S, minlength=len(counted_D))
                for domain, visits_R in enumerate(visits):
                    np.add.at(visits_R, rows_S[domains_S == domain], 1)
                np.add.at(sums, samples_S // global_batch_size, sample_digests(samples_S, domains_S, rows_S))
            phases += [
                PhaseCount(phase, domain, end - phase.start, share * (end - phase.start), int(counted), tolerance)
                for domain, (share, counted, tolerance) in enumerate(
                    zip(phase.shares_D, counted_D, _tolerances(plan, phase), strict=True)
                )
            ]
        return cls(plan, stop, visits, phases, sums[: stop // global_batch_size])

    def deviations(self) -> list[str]:
        """What is not as planned, a line each; empty if everything is."""
        found = []
        for name, visits_R, cap in zip(self.plan.domain_names, self.visits, self.plan.caps_D, strict=True):
            if len(visits_R) and visits_R.max() - visits_R.min() > 1:
                found.append(f"{name}: a row has {visits_R.max()} visits and another {visits_R.min()}")
            if cap is not None and visits_R.sum() > cap:
                found.append(f"{name}: {visits_R.sum()} samples, data.max_epochs allows {cap}")
        found += [
            f"phase {each.phase.number}: {each.counted} samples of {self.plan.domain_names[each.domain]}, "
            f"planned {each.planned:.1f} (within {each.tolerance:.1f})"
            for each in self.phases
            if not self._may_differ and abs(each.counted - each.planned) > each.tolerance
        ]
        counted = sum(int(visits_R.sum()) for visits_R in self.visits)
        if counted != self.stop:
            found.append(f"{counted} samples are counted, {self.stop} were planned")
        return found

    @property
    def _may_differ(self) -> bool:
        """With a hook's weights and caps, a domain at its cap gives its share to others in the midst of a change."""
        return self.plan.kind == "online" and any(cap is not None for cap in self.plan.caps_D)

    def recorded_deviations(self, recorded: Mapping[int, Sequence[int]]) -> list[str]:
        """Steps (from 1) whose recorded digests are not those of the plan, a line each. Only steps before `stop`."""
        found = []
        for step, values in sorted(recorded.items()):
            if step > len(self.digests):
                continue
            if len(values) > 1:
                found.append(f"step {step}: recorded {len(values)} times")
            elif values[0] != self.digests[step - 1]:
                found.append(f"step {step}: was trained on other samples than planned")
        return found


class DocumentVisits(NamedTuple):
    """Of each document of a domain: the fewest and the most visits of a row that holds a piece of it."""

    tokens_N: Integers
    least_N: Integers
    most_N: Integers


def document_visits(borders: Integers, pieces: Pieces, visits_R: NDArray[np.int32]) -> DocumentVisits:
    """`borders`: first token of each document, and the end of the last, [N + 1]. A document in no row has no visit."""
    starts_N, stops_N = borders[:-1], borders[1:]
    if not len(starts_N) or not len(pieces.rows_P):
        none = np.zeros(len(starts_N), dtype=np.int64)
        return DocumentVisits(stops_N - starts_N, none, none)
    first_N = np.searchsorted(pieces.stops_P, starts_N, side="right")
    last_N = np.searchsorted(pieces.starts_P, stops_N, side="left")
    visits_P = visits_R[pieces.rows_P].astype(np.int64)
    # Pairs of positions: every other slice that reduceat makes is a document's.
    bounds = np.stack([first_N, np.maximum(last_N, first_N)], axis=1).ravel()
    padded = np.append(visits_P, 0)
    has_piece_N = last_N > first_N
    least_N, most_N = (
        np.where(has_piece_N, reduce.reduceat(padded, bounds)[::2], 0) for reduce in (np.minimum, np.maximum)
    )
    return DocumentVisits(stops_N - starts_N, least_N, most_N)


def _chunks(start: int, stop: int) -> Iterator[Integers]:
    for begin in range(start, stop, _CHUNK):
        yield np.arange(begin, min(begin + _CHUNK, stop))


def _tolerances(plan: SamplePlan, phase: PhaseRecord) -> list[float]:
    if plan.kind == "online":
        return [1.0 + len(plan.rows_D)] * len(plan.rows_D)
    # In the block that a phase's end cuts, a domain may have given none of its quota yet, or all of it.
    return [share * BLOCK for share in phase.shares_D]
