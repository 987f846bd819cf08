"""Biases that are added are never read as factors, nor the other way round, whatever rule, hook or run comes next."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from launch import train
from launch._cli import run_command
from launch._trained import load_trained_model
from tests.harness import run, run_trainings, tiny_config
from trainer.data.config import DataConfig

MULTIPLICATIVE = {"expert_bias": {"rule": "multiplicative", "rate": 0.05}}
OFF = {"expert_bias": {"rule": "multiplicative", "enabled": False}}


def saved_biases(run_dir: Path, step: int) -> list[torch.Tensor]:
    weights = safetensors.torch.load_file(run_dir / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
    return [tensor for name, tensor in weights.items() if name.endswith("expert_bias_E")]


def test_a_run_keeps_the_meaning_of_its_biases(
    tmp_path: Path, data_config: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    short = {"train": {"steps": 2}, "schedule": {"warmup_steps": 1}, "evaluation": {"every": 0}}
    factors = tiny_config(tmp_path / "factors", data_config, hooks=MULTIPLICATIVE, **short)
    without = tiny_config(tmp_path / "without", data_config, hooks=OFF, **short)
    further = tiny_config(tmp_path / "further", data_config, hooks=MULTIPLICATIVE, **short)
    checkpoint = tmp_path / "factors/run/checkpoints/step-00000002"
    held = "hooks.expert_bias.rate=0"
    run_trainings(
        [(factors, []), (without, []), (further, [f"init_from={checkpoint}", held]), (factors, ["train.steps=3"])],
        ranks=0,
    )
    # Weights of a multiplicative run begin a multiplicative run as they are.
    assert not torch.equal(saved_biases(tmp_path / "factors/run", 3)[0], torch.ones(8))
    for mine, theirs in zip(
        saved_biases(tmp_path / "further/run", 2), saved_biases(checkpoint.parents[1], 2), strict=True
    ):
        assert torch.equal(mine, theirs)

    def refused(message: str, config: Path, *overrides: str) -> None:
        done = run("launch.train", str(config), "train.steps=4", *overrides)
        assert done.returncode == 2, done.stderr
        errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
        assert len(errors) == 1
        assert message in errors[0]

    before = (tmp_path / "factors/run/metrics.jsonl").read_bytes()
    refused("would now be added; keep rule multiplicative (with rate 0", factors, "hooks.expert_bias.enabled=false")
    refused("would multiply by them; choose another rule", without, "hooks.expert_bias.enabled=true")
    assert (tmp_path / "factors/run/metrics.jsonl").read_bytes() == before

    # What says so is in the checkpoint, not in the configuration.
    settings = tmp_path / "factors/run/config.yaml"
    assert "enabled: false" not in settings.read_text(), "a start that was refused leaves no trace"
    settings.write_text(settings.read_text().replace("rule: multiplicative", "rule: sign"))
    model = load_trained_model(tmp_path / "factors/run", torch.device("cpu"))[2]
    assert all(layer.router.multiplies for layer in model.moe_layers())
    sign = tiny_config(tmp_path / "sign", data_config, **short)
    capsys.readouterr()
    for overrides in ([], ["hooks.expert_bias.rule=none"], ["hooks.expert_bias.enabled=false"]):
        assert run_command(train.main, [str(sign), f"init_from={checkpoint}", *overrides]) == 2
        assert "would now be added" in capsys.readouterr().err
    state = json.loads((tmp_path / "further/run/checkpoints/step-00000002/state.json").read_text())
    assert state["hooks"]["expert_bias"]["values"]["rule"] == "multiplicative"
    (tmp_path / "further/run/checkpoints/step-00000002/state.json").unlink()
    lost = f"init_from={tmp_path / 'further/run/checkpoints/step-00000002'}"
    assert run_command(train.main, [str(sign), lost]) == 3
    assert "state.json is missing or unreadable" in capsys.readouterr().err
