"""The audit counts what a loop would, and a plan that breaks its promise does not get by."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.test_plan import online_of, plan_of
from trainer.data.audit import Audit, document_visits
from trainer.data.packing import Packing, SplitPacking, pack_best_fit


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    length=st.integers(1, 25),
    whole=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_visits_of_documents_are_those_of_the_rows_that_hold_them(
    lengths: list[int], length: int, whole: bool, seed: int
) -> None:
    borders = np.cumsum([0, *lengths])
    total = int(borders[-1])
    packing: Packing = (
        pack_best_fit(borders[:-1], total, length) if whole else SplitPacking(total, length, partial=False)
    )
    visits_R = np.random.default_rng(seed).integers(0, 5, packing.num_rows).astype(np.int32)
    found = document_visits(borders, packing.pieces(), visits_R)
    for number, (start, stop) in enumerate(itertools.pairwise(borders)):
        holding = [
            int(visits_R[row])
            for row in range(packing.num_rows)
            if any(span.start < stop and span.stop > start for span in packing.spans(row))
        ]
        assert (found.least_N[number], found.most_N[number]) == (min(holding, default=0), max(holding, default=0))
        assert found.tokens_N[number] == stop - start


@pytest.mark.parametrize("online", [False, True])
def test_a_plan_that_repeats_a_row_is_found_out(online: bool) -> None:
    plan = online_of((50, 60, 70)) if online else plan_of((50, 60, 70), [(0, (1, 1, 1)), (30, (1, 0, 1))])
    good = Audit.of(plan, 160, global_batch_size=8)
    assert good.deviations() == []
    assert good.recorded_deviations({step: [int(digest)] for step, digest in enumerate(good.digests, 1)}) == []
    original = plan.locate

    def cheating(samples_S):  # type: ignore[no-untyped-def]
        domains_S, rows_S = original(samples_S)
        rows_S[(samples_S >= 5) & (samples_S < 8)] = 0  # three times the same row
        return domains_S * (samples_S != 9), rows_S

    plan.locate = cheating  # type: ignore[method-assign]
    bad = Audit.of(plan, 160, global_batch_size=8)
    assert any("visits and another" in line for line in bad.deviations())
    wrong = bad.recorded_deviations({step: [int(digest)] for step, digest in enumerate(good.digests, 1)})
    assert "step 1: was trained on other samples than planned" in wrong
    assert len(wrong) <= 2
