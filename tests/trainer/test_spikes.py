"""What is a loss spike: nothing while losses only fall or scatter, whatever their scale; and what stands out."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.loader import load_run_config
from tests.harness import tiny_config
from trainer.data.config import DataConfig
from trainer.errors import ConfigError
from trainer.spikes import SpikeConfig, SpikeWatch, spike_limit
from trainer.train_state import TrainState

losses = st.lists(st.floats(0.1, 20.0), min_size=16, max_size=16)
CONFIG = SpikeConfig(policy="rewind", window=16, patience=3)


@given(losses, st.floats(-5.0, 5.0))
def test_the_limit_moves_with_the_losses(window: list[float], shift: float) -> None:
    moved = [loss + shift for loss in window]
    assert spike_limit(moved, CONFIG) == pytest.approx(spike_limit(window, CONFIG) + shift, abs=1e-9)


@given(losses, st.floats(1e3, 1e6))
def test_fewer_than_half_outliers_hardly_matter(window: list[float], wild: float) -> None:
    disturbed = [*window[:9], *[wild] * 7]
    assert spike_limit(disturbed, CONFIG) <= max(window) + 6 * 1.4826 * (max(window) - min(window)) + 0.1


@given(losses)
def test_nothing_is_a_spike_before_the_window_is_full(window: list[float]) -> None:
    assert spike_limit(window[:15], CONFIG) == float("inf")
    assert spike_limit(window, CONFIG) >= sorted(window)[7] + CONFIG.least_rise


def test_a_golden_limit() -> None:
    # Median 2.5 and median deviation 1 of 1, 2, 3, 4 repeated; 1.4826 * 6 = 8.8956.
    assert spike_limit([1.0, 2.0, 3.0, 4.0] * 4, CONFIG) == pytest.approx(2.5 + 8.8956)


def test_falling_noisy_losses_hold_no_spike_and_a_jump_is_one() -> None:
    dice = random.Random(0)
    watch = SpikeWatch(SpikeConfig(policy="skip"), TrainState())
    for step in range(2000):
        loss = 2.0 + 8.0 * 0.998**step + dice.gauss(0, 0.03)
        is_spike, reason = watch.judge(loss)
        assert (is_spike, reason) == (False, "")
        watch.note(loss, is_spike=is_spike)
    assert watch.judge(loss + 0.5)[0]


def test_a_loss_that_stays_high_becomes_the_normal() -> None:
    state = TrainState()
    watch = SpikeWatch(CONFIG, state)
    seen = []
    for loss in [2.0] * 16 + [5.0] * 20:
        is_spike, _ = watch.judge(loss)
        watch.note(loss, is_spike=is_spike)
        seen.append(is_spike)
    assert seen == [False] * 16 + [True] * 8 + [False] * 12
    assert state.recent_losses == [5.0] * 16


@pytest.mark.parametrize("window", range(8, 20))
def test_patience_beyond_what_a_loss_that_stays_high_can_reach_is_refused(window: int) -> None:
    watch = SpikeWatch(SpikeConfig(policy="skip", window=window), TrainState(recent_losses=[2.0] * window))
    seen = 0
    while watch.judge(9.0)[0]:
        watch.note(9.0, is_spike=True)
        seen += 1
    assert not SpikeConfig(policy="rewind", window=window, patience=seen).problems()
    (problem,) = SpikeConfig(policy="rewind", window=window, patience=seen + 1).problems()
    assert problem.startswith(f"patience: a loss that stays high is the normal after half a window, {seen} spikes")


def test_patience_counts_spikes_in_a_row_and_a_nan_ends_the_row() -> None:
    state = TrainState(recent_losses=[2.0] * 16)
    watch = SpikeWatch(CONFIG, state)
    for _ in range(2):
        watch.note(9.0, is_spike=True)
    watch.note(None, is_spike=False)
    assert state.spikes_in_a_row == 0
    for _ in range(3):
        assert not watch.asks_to_rewind
        watch.note(9.0, is_spike=True)
    assert watch.asks_to_rewind


def test_who_gave_up_on_a_row_of_spikes_asks_again_in_the_next_one() -> None:
    watch = SpikeWatch(CONFIG, TrainState(recent_losses=[2.0] * 16))
    for _ in range(3):
        watch.note(9.0, is_spike=True)
    watch.give_up()
    watch.note(9.0, is_spike=True)
    assert not watch.asks_to_rewind
    watch.note(2.0, is_spike=False)
    for _ in range(3):
        assert not watch.asks_to_rewind
        watch.note(9.0, is_spike=True)
    assert watch.asks_to_rewind


def test_a_rewind_that_no_checkpoint_could_serve_is_refused(tmp_path: Path, data_config: DataConfig) -> None:
    spikes = {"policy": "rewind", "rewind_steps": 9, "patience": 5}
    config = tiny_config(tmp_path, data_config, train={"spikes": spikes}, checkpoint={"every": 4, "keep": 3})

    def refused(*overrides: str) -> str:
        with pytest.raises(ConfigError) as error:
            load_run_config(str(config), overrides, world_size=1)
        assert len(error.value.problems) == 1
        return error.value.problems[0]

    assert "train.spikes.rewind_steps: 9 steps before 5 spikes" in refused()
    assert "is 8, rewind_steps + patience - 2 is 12" in refused()
    assert load_run_config(str(config), ["checkpoint.keep=4"], world_size=1)
    assert refused("checkpoint.keep=4", "train.spikes.patience=6"), "a checkpoint may come between the spikes"
    assert "rewind needs checkpoints" in refused("checkpoint.every=0")
    few = ["checkpoint.keep=4", "train.max_skipped_in_a_row=4"]
    assert "train.spikes.patience: the run ends after max_skipped_in_a_row (4)" in refused(*few)
    assert load_run_config(str(config), [*few, "train.spikes.patience=4"], world_size=1)


def first_spikes_without_way_back(config: SpikeConfig, *, every: int, keep: int) -> list[int]:
    """Steps of a long run at which `patience` spikes may begin so that no checkpoint is old enough at the last."""
    found = []
    start = every * keep + config.rewind_steps + 1  # by then as many are kept as there will ever be
    for first in range(start, start + every):
        kept: list[int] = []
        for step in range(1, first + config.patience - 1):  # before the last spike, of which none is saved
            if step % every == 0:
                kept = [*kept, step][-keep:]
        if not any(step <= first - config.rewind_steps for step in kept):
            found.append(first)
    return found


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 20), st.integers(1, 9))
def test_reach_is_what_every_rewind_needs_and_no_more(every: int, keep: int, rewind_steps: int, patience: int) -> None:
    config = SpikeConfig(policy="rewind", rewind_steps=rewind_steps, patience=patience)
    is_promised = (keep - 1) * every >= config.reach
    assert is_promised == (not first_spikes_without_way_back(config, every=every, keep=keep))
