"""A plan whose weights a hook may change at step boundaries.

Decisions:
- A change asked for after step t acts from step t + 1 + delay on, with a fixed delay. Requests are made in the training
  process and never reach further ahead, so neither workers nor the depth of prefetching can change what a step sees.
- Every step is a phase with whole samples of each domain. What rounding withholds from a domain in one step is its
  credit in the next: at no moment is a domain more than a few samples away from what its weights asked for.
- Going back after loss spikes is one more change: what was last asked for before the spikes is asked for again. Changes
  that are still to act may have been handed out already, so they act until then.
- A domain at its cap has no weight any more.
- A checkpoint holds what every domain has given and what credit is left, so that a resumed run replays no step. Only
  who asks for earlier samples has them replayed.

Shape letters: D domains.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.order import ORDER, Integers, Phase
from trainer.data.plan import VERSION, Mixture, PhaseRecord, SamplePlan
from trainer.errors import ConfigError

_NO_CAP = 2**62
_LAST = -1e18  # what a domain without weight is asked for: it comes after all others
Floats = NDArray[np.float64]


class OnlinePlan(SamplePlan):
    """Phases of one step each, of weights that change while the run goes on."""

    kind = "online"

    def __init__(
        self,
        domain_names: Sequence[str],
        rows_D: Sequence[int],
        *,
        seed: int,
        weights_D: Sequence[float],
        max_epochs: Mapping[str, float],
        global_batch_size: int,
        delay: int,
    ) -> None:
        """`weights_D`: until the first change; `delay`: see `change`."""
        self._size, self._delay = global_batch_size, delay
        self._changes: list[tuple[int, tuple[float, ...]]] = [(0, tuple(weights_D))]
        super().__init__(
            domain_names,
            rows_D,
            seed=seed,
            mixtures=[Mixture(0, tuple(weights_D), "data.weights")],
            max_epochs=max_epochs,
        )

    def change(self, weights_D: Sequence[float], *, steps_done: int) -> int:
        """Weights that act `delay` steps from now, or at once before the first step. Returns the steps before they act.

        Raises ConfigError if they are no mixture of domains that have rows.
        """
        weights = np.asarray(weights_D, dtype=np.float64)
        has_rows_D = np.array(self.rows_D) > 0
        if weights.shape != has_rows_D.shape or not np.isfinite(weights).all() or (weights < 0).any():
            raise ConfigError(
                f"hooks: sampling weights {weights.tolist()} must be {len(has_rows_D)} finite numbers, none negative"
            )
        weights = np.where(has_rows_D, weights, 0.0)
        if not weights.any():
            raise ConfigError("hooks: sampling weights give every domain that has text no weight")
        return self._ask(tuple((weights / weights.sum()).tolist()), steps_done)

    def return_to(self, state: Mapping[str, Any], *, steps_done: int) -> None:
        """Ask again for what was last asked for when `state_dict` gave `state`, unless nothing else was since."""
        weights_D = tuple(state["changes"][-1][1])
        if weights_D != self._changes[-1][1]:
            self._ask(weights_D, steps_done)

    def _ask(self, weights_D: tuple[float, ...], steps_done: int) -> int:
        # A run that goes on with a shorter delay has changes that are still to act: none overtakes another.
        step = max(steps_done + self._delay, self._changes[-1][0]) if steps_done else 0
        assert step == 0 or step >= self._steps_known, "samples of that step were handed out already"
        if self._changes[-1][0] == step:
            self._changes.pop()
        self._changes.append((step, weights_D))
        if step == 0:
            self._begin()
        return step

    def phase(self, sample: int) -> PhaseRecord:
        """The change in force at a sample, as a phase."""
        return self._change(self._change_at(sample // self._size))

    def phases(self, stop: int) -> list[PhaseRecord]:
        """Changes that act on samples before `stop`, in their order."""
        return [self._change(n) for n, (step, _) in enumerate(self._changes) if step * self._size < stop]

    def state_dict(self, sample: int) -> dict[str, Any]:
        """What a checkpoint before `sample` must hold; changes that are still to act are among it."""
        changes = [[step, list(weights_D)] for step, weights_D in self._changes]
        state = {"version": VERSION, "order": ORDER, "kind": self.kind}
        step = sample // self._size
        if step and sample == step * self._size and (self.end is None or sample < self.end):
            self._reach(sample)
            given_D, credit_D = self._counts(step)
            state["counts"] = {"step": step, "given": given_D, "credit": credit_D}
        return state | {"global_batch_size": self._size, "caps": list(self.caps_D), "changes": changes}

    def restore(self, state: Mapping[str, Any], sample: int) -> None:
        """Go on from what `state_dict` gave.

        Raises ConfigError if other caps or the other kind of sampling made it, CheckpointError if another version did.
        """
        self._refuse_other(state)
        if tuple(state["caps"]) != self.caps_D:
            raise ConfigError("data.max_epochs: cannot change in a run whose sampling a hook sets; restore it")
        self._changes = [(step, tuple(weights_D)) for step, weights_D in state["changes"]]
        self._begin()
        counts = state.get("counts")
        if counts is not None and counts["step"] * self._size == sample:
            self._first, self._given_D = counts["step"], np.array(counts["given"], dtype=np.int64)
            self._credit_D = np.array(counts["credit"])

    def _begin(self) -> None:
        self._first = 0  # steps that the list of phases leaves out
        self._phases = []
        self._credits: list[Floats] = []  # before each of them
        self._credit_D = np.zeros(len(self.rows_D))
        self._given_D = np.zeros(len(self.rows_D), dtype=np.int64)
        most_D = [_NO_CAP if cap is None else cap for cap in self.caps_D]
        self._most_D = np.where(np.array(self.rows_D) > 0, most_D, 0)
        if self._most_D.max() < _NO_CAP:  # shares go to others, so only the sum matters
            self.end = int(self._most_D.sum()) // self._size * self._size

    def _reach(self, sample: int) -> None:
        self.require(sample + 1)
        while (step := self._steps_known) * self._size <= sample:
            _, weights_D = self._changes[self._change_at(step)]
            left_D = self._most_D - self._given_D
            self._credits.append(self._credit_D)
            quotas_D, self._credit_D = step_quotas(np.array(weights_D), self._credit_D, left_D, self._size)
            self._phases.append(Phase(step * self._size, tuple(quotas_D.tolist()), tuple(self._given_D.tolist())))
            self._given_D = self._given_D + quotas_D

    @property
    def _steps_known(self) -> int:
        return self._first + len(self._phases)

    def _counts(self, step: int) -> tuple[list[int], list[float]]:
        """Samples given and credit left before a step that is known."""
        phase = self._phases[step - self._first]
        return list(phase.visits_D), self._credits[step - self._first].tolist()

    def _index(self, sample: int) -> int:
        if sample < self._first * self._size:  # somebody looks back, before the checkpoint we started from
            known = self._steps_known
            self._begin()
            self._reach(known * self._size - 1)
        return super()._index(sample)

    def _change_at(self, step: int) -> int:
        return bisect_right(self._changes, step, key=lambda change: change[0]) - 1

    def _change(self, number: int) -> PhaseRecord:
        step, weights_D = self._changes[number]
        total = sum(weights_D)
        cause = "data.weights" if number == 0 else "a hook set the sampling"
        return PhaseRecord(number, step * self._size, tuple(weight / total for weight in weights_D), cause)


def step_quotas(weights_D: Floats, credit_D: Floats, left_D: Integers, size: int) -> tuple[Integers, Floats]:
    """Samples of each domain in a step, int64 [D], and the credit it leaves for the next, float64 [D].

    `left_D`: samples a domain may still give; together at least `size`. If those that have weight cannot fill the step,
    the others do.
    """
    open_D = (left_D > 0) & (weights_D > 0)
    shares_D = np.where(open_D, weights_D, 0.0) / max(weights_D[open_D].sum(), 1e-300)
    wanted_D = np.where(open_D, credit_D + shares_D * size, _LAST)
    quotas_D = np.clip(np.where(open_D, np.floor(wanted_D), 0.0), 0, left_D).astype(np.int64)
    while (missing := size - int(quotas_D.sum())) > 0:
        behind_D = np.where(quotas_D < left_D, wanted_D - quotas_D, np.nan)
        quotas_D[np.nanargmax(behind_D)] += 1
    while missing < 0:
        behind_D = np.where(quotas_D > 0, wanted_D - quotas_D, np.nan)
        quotas_D[np.nanargmin(behind_D)] -= 1
        missing += 1
    return quotas_D, np.where(open_D, wanted_D - quotas_D, 0.0)
