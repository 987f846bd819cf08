"""Which domain and row every sample of a run is: the phases trained so far, and those that are still ahead.

Decisions:
- A phase that has given a sample is history: it is saved with the checkpoint (first sample, quotas, why it began) and
  repeated from there, whatever the configuration says by then. What lies ahead is the configuration's.
- So other weights on resume begin a new phase at the sample where the run goes on; a phase still ahead may move.
- A domain that has given all its rows `max_epochs` times ends a phase right there; the next has its share dealt out to
  the others in proportion. Where nobody is left the stream ends, and a run that wants more is refused when it starts.
- With online weights every step is a phase of its own (trainer/data/online.py).

Shape letters: S samples asked for, D domains.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from trainer.data.order import ORDER, Integers, Phase, block_quotas, locate, sample_of_visit, visits_before
from trainer.errors import CheckpointError, ConfigError

VERSION = 1


class Mixture(NamedTuple):
    """What the configuration wants from one sample on."""

    start: int
    weights_D: tuple[float, ...]
    name: str
    """Its key in the configuration."""


class PhaseRecord(NamedTuple):
    """A phase as the log and the audit show it."""

    number: int
    start: int
    shares_D: tuple[float, ...]
    cause: str


class SamplePlan:
    """Phases of one corpus, in which weights are those of the configuration."""

    kind = "phases"

    def __init__(
        self,
        domain_names: Sequence[str],
        rows_D: Sequence[int],
        *,
        seed: int,
        mixtures: Sequence[Mixture],
        max_epochs: Mapping[str, float],
    ) -> None:
        """`mixtures`: by rising start, the first from 0 on; each with weight somewhere, none where there are no rows.

        Raises ConfigError if a cap names no domain, or is less than a row.
        """
        assert mixtures[0].start == 0
        self.domain_names, self.rows_D = tuple(domain_names), tuple(int(rows) for rows in rows_D)
        self.caps_D = _caps(self.domain_names, self.rows_D, max_epochs)
        self.end: int | None = None
        """Samples there are; None without end."""
        self._seed, self._mixtures = seed, tuple(mixtures)
        self._phases: list[Phase] = []
        self._causes: list[str] = []
        self._begin()

    def locate(self, samples_S: Integers) -> tuple[Integers, Integers]:
        """Domain and row of each sample, both int64 [S]. Raises ConfigError beyond the end."""
        if not len(samples_S):
            return samples_S.copy(), samples_S.copy()
        self._reach(int(samples_S.max()))
        first, last = (self._index(int(sample)) for sample in (samples_S.min(), samples_S.max()))
        return locate(samples_S, self._phases[first : last + 1], rows_D=self.rows_D, seed=self._seed)

    def visits(self, sample: int) -> tuple[int, ...]:
        """Samples that each domain gives before `sample`."""
        if sample:
            self._reach(sample - 1)
        return visits_before(sample, self._phases[self._index(max(sample - 1, 0))], seed=self._seed)

    def phase(self, sample: int) -> PhaseRecord:
        """The phase of a sample."""
        self._reach(sample)
        return self._record(self._index(sample))

    def phases(self, stop: int) -> list[PhaseRecord]:
        """Phases of samples before `stop`, in their order."""
        return [self._record(number) for number, phase in enumerate(self._phases) if phase.start < stop]

    def require(self, samples: int) -> None:
        """Raise ConfigError if the caps do not allow so many samples."""
        if self.end is not None and samples > self.end:
            allowed = ", ".join(
                f"{name} {cap}" for name, cap in zip(self.domain_names, self.caps_D, strict=True) if cap is not None
            )
            raise ConfigError(
                f"data.max_epochs: the run wants {samples} samples, the caps allow {self.end} (at most {allowed}); "
                "raise a cap, add text or domains, or train fewer steps"
            )

    def state_dict(self, sample: int) -> dict[str, Any]:
        """What a checkpoint before `sample` must hold: plain numbers and strings, the same on every rank."""
        begun = [
            {"first_sample": phase.start, "quotas": list(phase.quotas_D), "cause": cause}
            for phase, cause in zip(self._phases, self._causes, strict=True)
            if phase.start < sample
        ]
        return {"version": VERSION, "order": ORDER, "kind": self.kind, "phases": begun}

    def restore(self, state: Mapping[str, Any], sample: int) -> None:
        """Go on before `sample` from what `state_dict` gave.

        Raises ConfigError if the other kind of sampling made it, CheckpointError if another version did.
        """
        self._refuse_other(state)
        self._phases, self._causes, self.end = [], [], None
        for saved in state["phases"]:
            self._add(saved["first_sample"], tuple(saved["quotas"]), saved["cause"])
        self._go_on(sample)

    def _begin(self) -> None:
        self._go_on(0)

    def _go_on(self, sample: int) -> None:
        """Phases from `sample` on, as the configuration has them, after those there are."""
        while True:
            mixture = self._mixtures[bisect_right(self._mixtures, sample, key=lambda each: each.start) - 1]
            visits_D = self._visits_so_far(sample)
            open_D = [cap is None or n < cap for n, cap in zip(visits_D, self.caps_D, strict=True)]
            weights_D = [w if is_open else 0.0 for w, is_open in zip(mixture.weights_D, open_D, strict=True)]
            if not any(weights_D):
                self.end = sample
                return
            quotas_D = tuple(block_quotas(weights_D).tolist())
            if not self._phases or quotas_D != self._phases[-1].quotas_D:
                self._add(sample, quotas_D, self._cause(sample, mixture, visits_D))
            phase = self._phases[-1]
            borders = [each.start for each in self._mixtures if each.start > sample] + [
                sample_of_visit(domain, cap - 1, phase, seed=self._seed) + 1
                for domain, cap in enumerate(self.caps_D)
                if weights_D[domain] and cap is not None
            ]
            if not borders:
                return
            sample = min(borders)

    def _cause(self, sample: int, mixture: Mixture, visits_D: Sequence[int]) -> str:
        if sample == mixture.start:
            return mixture.name
        if self._phases:
            before_D = self._phases[-1].quotas_D
            full = [
                name
                for name, quota, visits, cap in zip(self.domain_names, before_D, visits_D, self.caps_D, strict=True)
                if quota and visits == cap
            ]
            if full:
                return f"{', '.join(full)} reached data.max_epochs"
        return f"{mixture.name} as changed for this start"

    def _add(self, start: int, quotas_D: tuple[int, ...], cause: str) -> None:
        self._phases.append(Phase(start, quotas_D, self._visits_so_far(start)))
        self._causes.append(cause)

    def _visits_so_far(self, sample: int) -> tuple[int, ...]:
        if not self._phases:
            return (0,) * len(self.domain_names)
        return visits_before(sample, self._phases[-1], seed=self._seed)

    def _reach(self, sample: int) -> None:
        """Make sure that the phase of a sample is known."""
        self.require(sample + 1)

    def _index(self, sample: int) -> int:
        return bisect_right(self._phases, sample, key=lambda phase: phase.start) - 1

    def _record(self, number: int) -> PhaseRecord:
        phase = self._phases[number]
        size = sum(phase.quotas_D)
        return PhaseRecord(number, phase.start, tuple(quota / size for quota in phase.quotas_D), self._causes[number])

    def _refuse_other(self, state: Mapping[str, Any]) -> None:
        if (state["version"], state["order"]) != (VERSION, ORDER):
            raise CheckpointError(
                f"the checkpoint's sample order has version {state['version']}.{state['order']}, this code has "
                f"{VERSION}.{ORDER}: it would go on with other data; use the version that wrote it, or a new run_dir"
            )
        if state["kind"] != self.kind:
            was = {"phases": "without a hook that sets the sampling", "online": "with a hook that sets the sampling"}
            raise ConfigError(f"hooks: the run was trained {was[state['kind']]}; keep it so, or set a new run_dir")


def _caps(names: Sequence[str], rows_D: Sequence[int], max_epochs: Mapping[str, float]) -> tuple[int | None, ...]:
    for name in max_epochs.keys() - set(names):
        raise ConfigError(f"data.max_epochs.{name}: no such domain; the corpus has {', '.join(names)}")
    caps_D = tuple(
        int(np.floor(max_epochs[name] * rows)) if name in max_epochs else None
        for name, rows in zip(names, rows_D, strict=True)
    )
    for name, rows, cap in zip(names, rows_D, caps_D, strict=True):
        if cap == 0 and rows:
            raise ConfigError(
                f"data.max_epochs.{name}: {max_epochs[name]} of the domain's {rows} rows is less than one row; "
                "raise it, or give the domain no weight"
            )
    return caps_D
