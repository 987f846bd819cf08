"""Configuration files: includes, overrides, and a resolved form that loads back equal."""

import json
from pathlib import Path

import pytest
import yaml

from configs.loader import load_run_config, to_dict, to_yaml
from tests.harness import ROOT, tiny_config
from trainer.data.config import DataConfig
from trainer.errors import ConfigError

PRESETS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_resolved_config_loads_back_equal(path: Path, tmp_path: Path) -> None:
    world_size = {"quickstart": 2, "debug": 2, "reweighting-124m": 8}.get(path.stem, 64)
    config = load_run_config(path, world_size=world_size)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_run_config(tmp_path / "config.yaml", world_size=world_size) == config


def test_later_wins_file_over_include_override_over_file(tmp_path: Path, data_config: DataConfig) -> None:
    base = tiny_config(tmp_path, data_config)
    (tmp_path / "own.yaml").write_text(f"include: [{base.name}]\ntrain: {{steps: 50}}\noptimizer: {{eps: 1.0e-6}}\n")
    config = load_run_config(tmp_path / "own.yaml", ["train.steps=60", "wandb.tags=[a, b]"])
    assert (config.train.steps, config.optimizer.eps, config.seed) == (60, 1e-6, 3)
    assert config.wandb.tags == ("a", "b")


def test_hooks_are_resolved_with_all_their_options(tmp_path: Path, data_config: DataConfig) -> None:
    config = load_run_config(tiny_config(tmp_path, data_config), ["hooks.expert_bias.enabled=false"])
    found = config.hooks["expert_bias"]
    assert (found["hook"], found["enabled"], found["rule"], found["rate"]) == ("expert_bias", False, "sign", 0.01)
    assert found["schedule"] == {"shape": "constant", "zero_last": 0.0, "freeze_after": 0}
    assert found["options"]["kappa"] == 2.0
    assert config.hooks["sample_reweight"]["temperature"] == {
        "value": 0.5, "skip_steps": 0, "warmup_steps": 2, "warmup_value": 100.0, "shape": "constant", "final": 0.0,
        "points": {},
    }  # fmt: skip


def test_a_problem_says_where_it_comes_from(tmp_path: Path, data_config: DataConfig) -> None:
    path = tiny_config(tmp_path, data_config, train={"stps": 3})
    with pytest.raises(ConfigError) as caught:
        load_run_config(path, ["train.steps=x"])
    assert len(caught.value.problems) == 2
    assert caught.value.problems[0].startswith(f"{path}: train.stps")
    assert caught.value.problems[1].startswith("command line: train.steps")


def test_resolved_values_are_those_that_yaml_and_json_give_back() -> None:
    """A checkpoint compares its settings, which went through JSON, with those of the run that loads it."""
    plain = to_dict(load_run_config("configs/quickstart.yaml", ["wandb.tags=[a,b]"]))
    assert json.loads(json.dumps(plain)) == plain
    assert yaml.safe_load(to_yaml(load_run_config("configs/quickstart.yaml"))) == to_dict(
        load_run_config("configs/quickstart.yaml")
    )


@pytest.mark.parametrize("accumulation", ["deferred", "frozen"])
def test_graphs_cannot_wait_at_zero_3(accumulation: str, tmp_path: Path, data_config: DataConfig) -> None:
    config = tiny_config(
        tmp_path, data_config, engine={"zero_stage": 3}, hooks={"sample_reweight": {"strategy": "linear"}}
    )
    with pytest.raises(ConfigError, match=f"train.accumulation: {accumulation} keeps graphs"):
        load_run_config(config, [f"train.accumulation={accumulation}"])
    with pytest.raises(ConfigError, match="at 3 it has no expert groups"):
        load_run_config(config, ["engine.expert_parallel_size=2"], world_size=2)
    assert load_run_config(config).train.mode(needs_whole_step=True, keeps_graphs=False) == "two_pass"


@pytest.mark.parametrize(
    ("ranks", "override", "problem"),
    [
        (6, "engine.sequence_parallel_size=4", "4 does not divide the number of ranks (6)"),
        (2, "train.sequence_length=33", "2 does not divide train.sequence_length (33)"),
        (3, "engine.sequence_parallel_size=3", "3 does not divide model.num_heads (4); attention is cut by heads"),
        (2, "model={num_heads: 8, num_kv_heads: 1, capacity_factor: 1.5}", "2 with model.capacity_factor (1.5)"),
        (4, "model={hidden_size: 96, num_heads: 12, num_kv_heads: 6}", "4 neither divides nor is a multiple of"),
        (4, "train.micro_batch_size=8", "8 is not divisible by micro_batch_size x ranks = 8 x 2 = 16"),
    ],
)
def test_rows_are_spread_over_ranks_that_can_share_them(
    ranks: int, override: str, problem: str, tmp_path: Path, data_config: DataConfig
) -> None:
    config = tiny_config(tmp_path, data_config, engine={"sequence_parallel_size": 4 if "96" in override else 2})
    with pytest.raises(ConfigError) as caught:
        load_run_config(config, [override], world_size=ranks)
    assert problem in str(caught.value)
    load_run_config(config, world_size=4)
    load_run_config(config, world_size=None)
