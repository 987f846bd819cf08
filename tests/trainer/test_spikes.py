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


def test_a_rewind_that_no_checkpoint_could_serve_is_refused(tmp_path: Path, data_config: DataConfig) -> None:
    spikes = {"policy": "rewind", "rewind_steps": 9}
    config = tiny_config(tmp_path, data_config, train={"spikes": spikes}, checkpoint={"every": 4, "keep": 3})
    with pytest.raises(ConfigError, match=r"train\.spikes\.rewind_steps: 9 .* is 8"):
        load_run_config(str(config), [], world_size=1)
    assert load_run_config(str(config), ["checkpoint.keep=4"], world_size=1)
