"""Garbage that refers to itself: found between steps, at the same ones on every rank, and never during one."""

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import rows, run_trainings, tiny_config
from trainer.data.config import DataConfig
from trainer.garbage import FULL_EVERY, YOUNG_EVERY, StepGarbage


@pytest.fixture
def collected() -> Iterator[list[int]]:
    """Generations that were collected, in order."""
    seen: list[int] = []

    def note(phase: str, about: dict[str, int]) -> None:
        if phase == "start":
            seen.append(about["generation"])

    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_given_back_as_it_was_found_even_by_an_error(enabled: bool) -> None:
    was_enabled = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with contextlib.suppress(RuntimeError), StepGarbage():
            assert not gc.isenabled()
            assert gc.get_freeze_count() > 1000
            raise RuntimeError
        assert gc.isenabled() == enabled
        assert gc.get_freeze_count() == 0
    finally:
        (gc.enable if was_enabled else gc.disable)()


def test_young_objects_every_few_steps_and_all_at_pauses_and_now_and_then(collected: list[int]) -> None:
    with StepGarbage() as garbage:
        del collected[:]
        lists = [[] for _ in range(5000)]  # type: ignore[var-annotated]  # would have started the collector
        assert len(lists) == 5000
        assert collected == []
        steps = {}
        for step in range(1, FULL_EVERY + 1):
            garbage.after_step(step, paused=step == 2 * YOUNG_EVERY + 1)
            if collected:
                steps[step] = collected.pop()
    young = dict.fromkeys(range(YOUNG_EVERY, FULL_EVERY, YOUNG_EVERY), 1)
    assert steps == young | {2 * YOUNG_EVERY + 1: 2, FULL_EVERY: 2}


def test_a_run_collects_what_its_hooks_leave_behind_at_the_same_steps_on_all_ranks(
    tmp_path: Path, data_config: DataConfig
) -> None:
    pause, steps = YOUNG_EVERY + 5, 2 * YOUNG_EVERY + 4
    config = tiny_config(
        tmp_path, data_config, train={"steps": steps}, evaluation={"every": 0}, checkpoint={"every": pause},
        hooks={"circles": {"hook": "tests.dist.hooks:Circles"}},
    )  # fmt: skip
    run_trainings([(config, [])], ranks=2)
    training = [row for row in rows(tmp_path / "run") if "loss" in row]
    lives = [*range(1, YOUNG_EVERY + 1), *range(1, 6), *range(1, YOUNG_EVERY - 4), *range(1, 5)]
    assert [row["test/circles"] for row in training] == lives
    # What was collected before the first step is not the loop's.
    most = [row["test/most_collections"] for row in training[1:]]
    fewest = [-row["test/fewest_collections"] for row in training[1:]]  # type: ignore[operator]
    after = {YOUNG_EVERY, pause, 2 * YOUNG_EVERY}
    assert most == fewest == [int(step - 1 in after) for step in range(2, steps + 1)]
