"""Phases, caps and online weights: everything exactly as often as planned, and nothing seen is ever reshuffled."""

import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.online import OnlinePlan, step_quotas
from trainer.data.order import BLOCK
from trainer.data.plan import Mixture, SamplePlan
from trainer.errors import CheckpointError, ConfigError

NAMES = ("a", "b", "c")
seeds = st.integers(0, 2**32 - 1)
rows = st.tuples(*[st.integers(1, 3000)] * 3)
weights = st.tuples(*[st.floats(0, 10)] * 3).filter(lambda w: sum(w) > 0.1)
caps = st.dictionaries(st.sampled_from(NAMES), st.floats(1, 4), max_size=3)


def plan_of(
    rows_D: Sequence[int],
    mixtures: Sequence[tuple[int, Sequence[float]]],
    *,
    seed: int = 1,
    max_epochs: dict[str, float] | None = None,
) -> SamplePlan:
    keys = ["data.weights", *(f"data.phases[{number}]" for number in range(len(mixtures)))]
    named = [Mixture(start, tuple(each), key) for (start, each), key in zip(mixtures, keys, strict=False)]
    return SamplePlan(NAMES, rows_D, seed=seed, mixtures=named, max_epochs=max_epochs or {})


def stream(plan: SamplePlan, start: int, stop: int) -> list[tuple[int, int]]:
    return [(int(d), int(r)) for d, r in zip(*plan.locate(np.arange(start, stop)), strict=True)]


def counts(samples: Sequence[tuple[int, int]], rows_D: Sequence[int]) -> list[np.ndarray]:
    domains, located = np.array(samples).T if samples else np.zeros((2, 0), dtype=int)
    return [np.bincount(located[domains == d], minlength=n) for d, n in enumerate(rows_D)]


@st.composite
def courses(draw: st.DrawFn) -> list[tuple[int, tuple[float, ...]]]:
    starts = sorted(draw(st.sets(st.integers(1, 9000), max_size=4)))
    return [(start, draw(weights)) for start in [0, *starts]]


@settings(max_examples=40)
@given(seed=seeds, rows_D=rows, mixtures=courses(), max_epochs=caps, cut=st.integers(0, 12000))
def test_rows_come_once_an_epoch_through_all_phases_and_caps_hold(
    seed: int,
    rows_D: tuple[int, ...],
    mixtures: list[tuple[int, tuple[float, ...]]],
    max_epochs: dict[str, float],
    cut: int,
) -> None:
    plan = plan_of(rows_D, mixtures, seed=seed, max_epochs=max_epochs)
    stop = 12000 if plan.end is None else min(plan.end, 12000)
    samples = stream(plan, 0, stop)
    cut = min(cut, stop)
    for part in (samples, samples[:cut]):
        for visits_R, cap in zip(counts(part, rows_D), plan.caps_D, strict=True):
            assert visits_R.max() - visits_R.min() <= 1, "wherever one stops"
            assert cap is None or visits_R.sum() <= cap
    assert plan.visits(cut) == tuple(int(visits_R.sum()) for visits_R in counts(samples[:cut], rows_D))
    # However it is cut into requests, the samples are the same.
    assert stream(plan, cut, min(cut + 70, stop)) == samples[cut : cut + 70]

    phases = plan.phases(stop)
    ends = [phase.start for phase in phases[1:]] + [stop]
    for phase, end in zip(phases, ends, strict=True):
        asked = np.array([w for start, w in mixtures if start <= phase.start][-1])
        full = np.array(
            [cap is not None and n >= cap for n, cap in zip(plan.visits(phase.start), plan.caps_D, strict=True)]
        )
        asked = np.where(full, 0, asked)
        for begin in range(phase.start, end - BLOCK + 1, BLOCK):
            got = np.bincount([d for d, _ in samples[begin : begin + BLOCK]], minlength=3)
            assert (np.abs(got - asked / asked.sum() * BLOCK) <= 3).all(), "shares are met in every block"
        assert not {d for d, _ in samples[phase.start : end] if asked[d] == 0}
    if plan.end is not None:
        last = np.array([w for start, w in mixtures if start <= plan.end][-1])
        assert all(
            cap is not None and n == cap
            for n, cap, w in zip(plan.visits(plan.end), plan.caps_D, last, strict=True)
            if w
        )


@settings(max_examples=25)
@given(seed=seeds, rows_D=rows, mixtures=courses(), at=st.integers(1, 9000), other=courses(), max_epochs=caps)
def test_resume_with_another_configuration_keeps_what_was_seen(
    seed: int, rows_D: tuple[int, ...], mixtures: list[tuple[int, tuple[float, ...]]], at: int,
    other: list[tuple[int, tuple[float, ...]]], max_epochs: dict[str, float],
) -> None:  # fmt: skip
    before = plan_of(rows_D, mixtures, seed=seed)
    seen = stream(before, 0, at)
    after = plan_of(rows_D, other, seed=seed, max_epochs=max_epochs)
    after.restore(before.state_dict(at), at)
    assert stream(after, 0, at) == seen
    stop = at + 3000 if after.end is None else min(after.end, at + 3000)
    for visits_R in counts(stream(after, 0, stop), rows_D):
        assert visits_R.max() - visits_R.min() <= 1, "epochs go on across the change"
    # Resumed once more with the same configuration, nothing changes.
    again = plan_of(rows_D, other, seed=seed, max_epochs=max_epochs)
    for sample in (stop, (at + stop) // 2):
        again.restore(after.state_dict(sample), sample)
        assert stream(again, 0, stop) == stream(after, 0, stop)
        assert again.phases(stop) == after.phases(stop)


def test_other_weights_on_resume_begin_a_phase_and_the_same_ones_do_not() -> None:
    before = plan_of((500, 500, 500), [(0, (1, 1, 1)), (8000, (1, 0, 0))])
    same = plan_of((500, 500, 500), [(0, (2, 2, 2)), (8000, (1, 0, 0))])
    same.restore(before.state_dict(1001), 1001)
    assert stream(same, 0, 9000) == stream(before, 0, 9000)
    changed = plan_of((500, 500, 500), [(0, (1, 2, 1)), (7000, (1, 0, 0))])
    changed.restore(before.state_dict(1001), 1001)
    assert [(p.start, p.cause) for p in changed.phases(9000)] == [
        (0, "data.weights"), (1001, "data.weights as changed for this start"), (7000, "data.phases[0]"),
    ]  # fmt: skip
    assert stream(changed, 0, 1001) == stream(before, 0, 1001)
    assert stream(changed, 1001, 1100) != stream(before, 1001, 1100)


def test_a_cap_hands_the_share_to_the_others_at_the_very_sample() -> None:
    plan = plan_of((100, 1000, 9999), [(0, (1, 1, 2))], max_epochs={"a": 2.5, "b": 1})
    _first, second, third = plan.phases(10**6)
    samples = stream(plan, 0, 20_000)
    of_a = [n for n, (d, _) in enumerate(samples) if d == 0]
    assert len(of_a) == 250
    assert second.start == of_a[-1] + 1
    assert second.shares_D == pytest.approx((0, 1 / 3, 2 / 3), abs=1e-3)
    assert (second.cause, third.cause) == ("a reached data.max_epochs", "b reached data.max_epochs")
    assert sum(d == 1 for d, _ in samples) == 1000
    assert third.shares_D == (0, 0, 1)
    assert plan.end is None


def test_too_few_samples_are_said_with_their_number() -> None:
    plan = plan_of((100, 50, 0), [(0, (1, 1, 0))], max_epochs={"a": 2, "b": 0.5})
    assert plan.end == 225
    plan.require(225)
    with pytest.raises(ConfigError, match=r"wants 226 samples, the caps allow 225 \(at most a 200, b 25\)"):
        plan.require(226)
    with pytest.raises(ConfigError, match="caps allow 225"):
        plan.locate(np.array([225]))
    with pytest.raises(ConfigError, match=r"max_epochs.d: no such domain"):
        plan_of((1, 1, 1), [(0, (1, 1, 1))], max_epochs={"d": 2})
    with pytest.raises(ConfigError, match=r"max_epochs.a: 0.1 of the domain's 5 rows is less than one row"):
        plan_of((5, 1, 1), [(0, (1, 1, 1))], max_epochs={"a": 0.1})


def test_longer_training_moves_only_what_is_ahead() -> None:
    """`from_share` of a longer run: a phase that has begun stays, one that is ahead comes later."""
    short = plan_of((500, 500, 500), [(0, (1, 1, 1)), (900, (1, 0, 0))])
    longer = [(0, (1, 1, 1)), (1800, (1, 0, 0))]
    for at, starts in ((600, [0, 1800]), (950, [0, 900, 950, 1800])):
        resumed = plan_of((500, 500, 500), longer)
        resumed.restore(short.state_dict(at), at)
        assert [phase.start for phase in resumed.phases(5000)] == starts
        assert stream(resumed, 0, at) == stream(short, 0, at)


def test_states_of_other_versions_and_kinds_are_refused() -> None:
    plan = plan_of((5, 5, 5), [(0, (1, 1, 1))])
    with pytest.raises(CheckpointError, match="other data"):
        plan.restore(plan.state_dict(3) | {"order": 1}, 3)
    with pytest.raises(ConfigError, match="was trained with a hook that sets the sampling"):
        plan.restore(online_of((5, 5, 5)).state_dict(3), 3)


def online_of(
    rows_D: Sequence[int], *, max_epochs: dict[str, float] | None = None, size: int = 8, seed: int = 1
) -> OnlinePlan:
    caps, even = max_epochs or {}, (1.0, 1.0, 1.0)
    return OnlinePlan(NAMES, rows_D, seed=seed, weights_D=even, max_epochs=caps, global_batch_size=size, delay=3)


@settings(max_examples=12)
@given(
    seed=seeds,
    rows_D=rows,
    changes=st.dictionaries(st.integers(0, 60), weights, max_size=20),
    size=st.integers(1, 40),
    max_epochs=caps,
)
def test_online_weights_are_met_and_rows_come_once_an_epoch(
    seed: int, rows_D: tuple[int, ...], changes: dict[int, tuple[float, ...]], size: int, max_epochs: dict[str, float]
) -> None:
    plan = online_of(rows_D, seed=seed, size=size, max_epochs=max_epochs)
    steps = 80 if plan.end is None else min(80, plan.end // size)
    in_force = (1.0, 1.0, 1.0)
    pending = {0: in_force}
    target = np.zeros(3)
    samples: list[tuple[int, int]] = []
    for step in range(steps):
        if step in changes:
            acts = plan.change(changes[step], steps_done=step)
            assert acts == (step + 3 if step else 0)
            pending[acts] = changes[step]
        in_force = pending.get(step, in_force)
        plan.locate(np.arange(step * size, (step + 3) * size if plan.end is None else (step + 1) * size))  # read ahead
        samples += stream(plan, step * size, (step + 1) * size)
        target += np.array(in_force) / sum(in_force) * size
        if not max_epochs:
            got = np.bincount([d for d, _ in samples], minlength=3)
            assert (np.abs(got - target) < 3).all(), "at no moment is a domain far from what was asked for"
    for visits_R, cap in zip(counts(samples, rows_D), plan.caps_D, strict=True):
        assert visits_R.max() - visits_R.min() <= 1
        assert cap is None or visits_R.sum() <= cap
    resumed = online_of(rows_D, seed=seed, size=size, max_epochs=max_epochs)
    resumed.restore(plan.state_dict(steps * size), steps * size)
    assert stream(resumed, 0, steps * size) == samples
    assert resumed.state_dict(0) == plan.state_dict(0)
    half = steps // 2 * size
    resumed = online_of(rows_D, seed=seed, size=size, max_epochs=max_epochs)
    resumed.restore(plan.state_dict(half), half)
    assert stream(resumed, half, steps * size) == samples[half:]
    assert stream(resumed, 0, steps * size) == samples, "what came before is found again"


def test_a_resumed_plan_replays_no_step() -> None:
    plan = online_of((50, 60, 70))
    state = plan.state_dict(8)
    state["counts"] = {"step": 10**9, "given": [2 * 10**9, 3 * 10**9, 3 * 10**9], "credit": [0.25, 0.5, -0.75]}
    start = time.process_time()
    plan.restore(state, 8 * 10**9)
    assert len(stream(plan, 8 * 10**9, 8 * 10**9 + 24)) == 24
    assert time.process_time() - start < 1.0


def test_a_shorter_delay_overtakes_no_change_that_is_still_to_act() -> None:
    plan = online_of((50, 60, 70))
    assert plan.change((1.0, 0.0, 0.0), steps_done=5) == 8
    resumed = online_of((50, 60, 70))
    resumed._delay = 1
    resumed.restore(plan.state_dict(40), 40)
    assert resumed.change((0.0, 1.0, 0.0), steps_done=6) == 8
    assert {d for d, _ in stream(resumed, 56, 64)} == {0, 1, 2}
    assert {d for d, _ in stream(resumed, 64, 72)} == {1}


def test_a_way_back_asks_again_for_what_was_last_asked_for_then() -> None:
    plan = online_of((50, 60, 70))
    plan.change((1.0, 0.0, 0.0), steps_done=4)
    then = plan.state_dict(40)  # of step 5; the change is still to act, from step 7 on
    plan.return_to(then, steps_done=5)
    assert plan.state_dict(40)["changes"] == then["changes"], "nothing else was asked for since"
    plan.change((0.0, 1.0, 0.0), steps_done=6)
    plan.change((0.0, 0.0, 1.0), steps_done=8)
    plan.locate(np.arange(11 * 8))  # handed out before anybody knew
    plan.return_to(then, steps_done=8)
    domains = [{d for d, _ in stream(plan, step * 8, (step + 1) * 8)} for step in range(7, 14)]
    assert domains == [{0}, {0}, {1}, {1}, {0}, {0}, {0}]
    resumed = online_of((50, 60, 70))
    resumed.restore(plan.state_dict(64), 64)
    assert stream(resumed, 64, 112) == stream(plan, 64, 112)


def test_what_is_read_ahead_changes_nothing() -> None:
    """The same requests with one step and with three steps read ahead."""
    found = []
    for ahead in (1, 3):
        plan = online_of((50, 60, 70))
        for step in range(30):
            plan.locate(np.arange((step + ahead) * 8))
            plan.change((1.0 + step, 2.0, 30.0 - step), steps_done=step + 1)
        found.append(stream(plan, 0, 30 * 8))
    assert found[0] == found[1]


def test_online_weights_that_are_no_mixture_are_refused() -> None:
    plan = online_of((5, 5, 0))
    for bad in ((1.0, 2.0), (1.0, float("nan"), 0.0), (-1.0, 1.0, 1.0), (0.0, 0.0, 1.0)):
        with pytest.raises(ConfigError, match="sampling weights"):
            plan.change(bad, steps_done=1)
    assert {d for d, _ in stream(plan, 0, 80)} == {0, 1}, "a domain without rows is never asked"
    with pytest.raises(ConfigError, match="cannot change in a run"):
        online_of((5, 5, 0), max_epochs={"a": 2}).restore(plan.state_dict(8), 8)


@given(
    weights_D=weights,
    credit_D=st.tuples(*[st.floats(-2, 2)] * 3),
    left_D=st.tuples(*[st.integers(0, 30)] * 3),
    size=st.integers(1, 30),
)  # fmt: skip
def test_step_quotas_fill_the_step(
    weights_D: tuple[float, ...], credit_D: tuple[float, ...], left_D: tuple[int, ...], size: int
) -> None:
    size = min(size, sum(left_D))
    quotas_D, _ = step_quotas(np.array(weights_D), np.array(credit_D), np.array(left_D), size)
    assert quotas_D.sum() == size
    assert (quotas_D >= 0).all()
    assert (quotas_D <= left_D).all()
