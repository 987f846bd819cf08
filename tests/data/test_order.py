"""Sample order: a pure function that visits everything equally often."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.order import BLOCK, ORDER, Phase, block_quotas, locate, permute, sample_of_visit, visits_before

seeds = st.integers(0, 2**32 - 1)


def one_phase(weights: list[float], **changes: object) -> list[Phase]:
    return [Phase(0, tuple(block_quotas(weights).tolist()), (0,) * len(weights))._replace(**changes)]


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    keys = np.full(size, key, dtype=np.uint64)
    images = permute(np.arange(size), size=size, keys=keys)
    assert sorted(images) == list(range(size))


@given(key=st.integers(0, 2**63))
def test_permutations_differ_by_key_and_mix(key: int) -> None:
    first, second = (permute(np.arange(1000), size=1000, keys=np.full(1000, k, np.uint64)) for k in (key, key + 1))
    assert (first == second).mean() < 0.05
    assert (np.diff(first) == 1).mean() < 0.05, "neighbours are torn apart"


@given(weights=st.lists(st.floats(0, 100), min_size=1, max_size=30).filter(lambda w: sum(w) > 0.1))
def test_quotas_are_the_weights_to_one_part_in_a_block(weights: list[float]) -> None:
    quotas = block_quotas(weights)
    assert quotas.sum() == BLOCK
    exact = np.array(weights) / sum(weights) * BLOCK
    assert (quotas[np.array(weights) > 0] >= 1).all()
    assert (quotas[np.array(weights) == 0] == 0).all()
    assert (np.abs(quotas - exact) <= len(weights)).all()
    if min(w for w in weights if w > 0) / sum(weights) * BLOCK >= 1:
        assert (np.abs(quotas - exact) < 1 + 1e-9).all()


@given(seed=seeds, stop=st.integers(1, 3 * BLOCK), rows=st.tuples(*[st.integers(1, 5000)] * 3))
@pytest.mark.fault(3, "every row once an epoch, from any step on")
def test_every_block_has_its_quotas_and_every_epoch_every_row_once(
    seed: int, stop: int, rows: tuple[int, int, int]
) -> None:
    phases = one_phase([3, 1, 2])
    domains, located = locate(np.arange(stop), phases, rows_D=rows, seed=seed)
    for block in range(stop // BLOCK):
        counts = np.bincount(domains[block * BLOCK : (block + 1) * BLOCK], minlength=3)
        assert tuple(counts) == phases[0].quotas_D
    for domain in range(3):
        visits = np.bincount(located[domains == domain], minlength=rows[domain])
        assert visits.max() - visits.min() <= 1, "wherever one stops, no row is a second time before every row was seen"
        assert len(visits) == rows[domain]
        assert visits_before(stop, phases[0], seed=seed)[domain] == (domains == domain).sum()
        for visit in {0, int(visits.sum()) // 2, int(visits.sum()) - 1} - {-1}:
            if visit < visits.sum():
                sample = sample_of_visit(domain, visit, phases[0], seed=seed)
                assert domains[sample] == domain
                assert (domains[:sample] == domain).sum() == visit


@given(seed=seeds, samples=st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
def test_a_sample_does_not_depend_on_what_else_is_asked_for(seed: int, samples: list[int]) -> None:
    arguments = {"rows_D": (100, 77), "seed": seed}
    domains, rows = locate(np.array(samples), one_phase([1, 5]), **arguments)
    for sample, domain, row in zip(samples, domains, rows, strict=True):
        alone = locate(np.array([sample]), one_phase([1, 5]), **arguments)
        assert (alone[0][0], alone[1][0]) == (domain, row)


def test_order_is_fixed_for_ever() -> None:
    """These figures change with ORDER alone, which every checkpoint names: old runs count on them."""
    assert ORDER == 2
    samples = np.array([0, 1, 2, 4095, 4096, 10**9])
    domains, rows = locate(samples, one_phase([1, 2]), rows_D=(1000, 333), seed=7)
    assert domains.tolist() == GOLDEN_DOMAINS
    assert rows.tolist() == GOLDEN_ROWS
    later = [*one_phase([1, 2]), Phase(1000, (3, 1, 0), (330, 670, 0))]
    domains, rows = locate(np.array([999, 1000, 1001, 5000, 10**9]), later, rows_D=(1000, 333, 1), seed=7)
    assert domains.tolist() == GOLDEN_LATER_DOMAINS
    assert rows.tolist() == GOLDEN_LATER_ROWS


GOLDEN_DOMAINS = [1, 0, 1, 1, 1, 1]
GOLDEN_ROWS = [112, 903, 125, 182, 153, 248]
GOLDEN_LATER_DOMAINS = [1, 0, 0, 0, 0]
GOLDEN_LATER_ROWS = [328, 954, 211, 156, 542]


def test_a_jump_costs_nothing() -> None:
    phases, arguments = one_phase([1, 2, 3]), {"rows_D": (10**6, 10**5, 10**7), "seed": 1}
    near, far = np.arange(100_000), np.arange(10**12, 10**12 + 100_000)
    locate(near, phases, **arguments)
    spent = []
    for samples in (near, far):
        begin = time.process_time()
        locate(samples, phases, **arguments)
        spent.append(time.process_time() - begin)
    assert spent[1] < 5 * spent[0] + 0.05


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_seeds_give_different_orders(seed: int) -> None:
    arguments = {"rows_D": (4096,)}
    _, first = locate(np.arange(4096), one_phase([1]), seed=seed, **arguments)
    _, other = locate(np.arange(4096), one_phase([1]), seed=12345, **arguments)
    assert (first == other).mean() < 0.01
