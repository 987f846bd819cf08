"""A step with a NaN in it, on one rank, in one sample, changes nothing on any rank."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.harness import losses, rows, run, run_trainings, tiny_config
from trainer.data.config import DataConfig

POISONED_STEP = 3
NO_REWEIGHT = "hooks.sample_reweight.enabled=false"
PARTITIONED = ["engine.zero_options={stage3_param_persistence_threshold: 0}"]  # small parameters too
CASES = {
    "loss, fp32 ZeRO 0": ("loss", ["engine.zero_stage=0"]),
    "loss, fp32 ZeRO 1, two passes": ("loss", ["engine.zero_stage=1", "train.accumulation=two_pass"]),
    "loss, fp32 ZeRO 0, streaming": ("loss", ["engine.zero_stage=0", NO_REWEIGHT]),
    "loss, fp32 ZeRO 1, streaming": ("loss", ["engine.zero_stage=1", NO_REWEIGHT]),
    "loss, bf16 ZeRO 1, streaming": ("loss", ["engine.zero_stage=1", "engine.precision=bf16", NO_REWEIGHT]),
    "loss, bf16 ZeRO 2, streaming": ("loss", ["engine.zero_stage=2", "engine.precision=bf16", NO_REWEIGHT]),
    "loss, fp32 ZeRO 3, two passes": ("loss", ["engine.zero_stage=3", *PARTITIONED]),
    "loss, bf16 ZeRO 3, streaming": ("loss", ["engine.zero_stage=3", "engine.precision=bf16", NO_REWEIGHT, *PARTITIONED]),
    "loss, fp32 ZeRO 2 EP 2": ("loss", ["engine.zero_stage=2", "engine.expert_parallel_size=2"]),
    "gradient, fp32 ZeRO 1 EP 2": ("gradient", ["engine.zero_stage=1", "engine.expert_parallel_size=2"]),
    "gradient, bf16 ZeRO 2 EP 2": (
        "gradient",
        ["engine.zero_stage=2", "engine.precision=bf16", "engine.expert_parallel_size=2"],
    ),
    "loss, fp32 ZeRO 1 SP 2, streaming": ("loss", ["engine={zero_stage: 1, sequence_parallel_size: 2}", NO_REWEIGHT]),
    "gradient, fp32 ZeRO 0 SP 2": ("gradient", ["engine.sequence_parallel_size=2"]),
    "gradient, fp32 ZeRO 2 EP 2 offload": (
        "gradient", ["engine={zero_stage: 2, expert_parallel_size: 2, offload_optimizer: true}"]
    ),
    "gradient, bf16 ZeRO 1 offload": ("gradient", ["engine={zero_stage: 1, precision: bf16, offload_optimizer: true}"]),
    "loss, bf16 ZeRO 2 offload, streaming": (
        "loss", ["engine={zero_stage: 2, precision: bf16, offload_optimizer: true}", NO_REWEIGHT]
    ),
    "gradient, bf16 ZeRO 3 offload": (
        "gradient", ["engine={zero_stage: 3, precision: bf16, offload_optimizer: true}", *PARTITIONED]
    ),
    "gradient, fp32 ZeRO 0": ("gradient", ["engine.zero_stage=0"]),
    "gradient, fp32 ZeRO 1": ("gradient", ["engine.zero_stage=1"]),
    "gradient, fp32 ZeRO 2": ("gradient", ["engine.zero_stage=2"]),
    "gradient, fp32 ZeRO 3": ("gradient", ["engine.zero_stage=3", *PARTITIONED]),
    "gradient, bf16 ZeRO 0": ("gradient", ["engine.zero_stage=0", "engine.precision=bf16"]),
    "gradient, bf16 ZeRO 1": ("gradient", ["engine.zero_stage=1", "engine.precision=bf16"]),
    "gradient, bf16 ZeRO 2": ("gradient", ["engine.zero_stage=2", "engine.precision=bf16"]),
    "expert, fp32 ZeRO 0": ("expert", ["engine.zero_stage=0"]),
    "expert, bf16 ZeRO 1 EP 2": (
        "expert", ["engine={zero_stage: 1, precision: bf16, expert_parallel_size: 2}", NO_REWEIGHT]
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data_config: DataConfig) -> Path:
    """Six steps of each case with a checkpoint after each; the third step is poisoned on rank 1."""
    folder = tmp_path_factory.mktemp("skip")
    plan = []
    for name, (kind, overrides) in CASES.items():
        poison = {"hook": "tests.dist.hooks:Poison", "kind": kind, "first": POISONED_STEP, "last": POISONED_STEP}
        config = tiny_config(
            folder / name,
            data_config,
            train={"steps": 6},
            checkpoint={"every": 1, "keep": 9},
            evaluation={"every": 0, "max_rows": 1},
            hooks={"poison": poison},
        )
        plan.append((config, overrides))
    run_trainings(plan, ranks=2)
    return folder


FAULTS = {
    "loss": (10, "NaN in a loss on one rank"),
    "expert": (10, "NaN in one number of one expert's gradient on one rank"),
    "gradient": (12, "NaN in a gradient on one rank"),
}


def marked(name: str) -> object:
    return pytest.param(name, marks=pytest.mark.fault(*FAULTS[CASES[name][0]]))


@pytest.mark.parametrize("name", map(marked, CASES))
def test_poisoned_step_changes_nothing(name: str, runs: Path) -> None:
    run_dir = runs / name / "run"
    training = [row for row in rows(run_dir) if "loss" in row]
    assert [row["step/applied"] for row in training] == [1, 1, 0, 1, 1, 1]
    assert all(isinstance(row["loss"], float) for row in training[3:]), "training goes on with finite losses"

    before, after = (run_dir / "checkpoints" / f"step-{step:08d}" for step in (POISONED_STEP - 1, POISONED_STEP))
    for path in sorted(before.glob("*.safetensors")):
        if path.name.startswith("rng-"):
            continue
        old, new = (safetensors.torch.load_file(folder / path.name) for folder in (before, after))
        assert old.keys() == new.keys()
        for key, tensor in old.items():
            assert torch.equal(tensor, new[key]), f"{path.name}: {key} moved on a skipped step"
    assert (before / "optimizer.json").read_text() == (after / "optimizer.json").read_text(), "Adam's clock stands still"

    state_before, state_after = (json.loads((folder / "state.json").read_text()) for folder in (before, after))
    assert state_after["trainer"]["applied_steps"] == state_before["trainer"]["applied_steps"] == 2
    assert state_after["hooks"] == state_before["hooks"]
    assert training[3]["lr"] == pytest.approx(3e-3), "the learning rate of the third update comes with the fourth step"
    later = safetensors.torch.load_file(run_dir / "checkpoints" / "step-00000004" / "model.safetensors")
    assert not torch.equal(later["embedding.weight"], safetensors.torch.load_file(after / "model.safetensors")["embedding.weight"])


@pytest.mark.fault(10, "the steps after a NaN")
def test_the_steps_after_are_those_of_a_run_without_the_batch(
    runs: Path, tmp_path: Path, data_config: DataConfig
) -> None:
    name = "expert, fp32 ZeRO 0"
    config = runs / name / "config.yaml"
    run_trainings(
        [(config, [f"run_dir={tmp_path}", *CASES[name][1], "hooks.poison.enabled=false", "checkpoint.every=5"])],
        ranks=2, seam="third_batch_left_out",
    )  # fmt: skip
    skipped, left_out = losses(runs / name / "run"), losses(tmp_path)
    assert [*skipped[:2], *skipped[3:]] == left_out[:5]
    folders = runs / name / "run" / "checkpoints" / "step-00000006", tmp_path / "checkpoints" / "step-00000005"
    weights, expected = (safetensors.torch.load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(weights[key], tensor) for key, tensor in expected.items()), "the experts' biases too"


@pytest.mark.fault(11, "NaN in step after step")
def test_many_skipped_steps_end_the_run_with_exit_4(tmp_path: Path, data_config: DataConfig) -> None:
    poison = {"hook": "tests.dist.hooks:Poison", "kind": "loss", "first": 3, "last": 99, "rank": 0}
    config = tiny_config(tmp_path, data_config, train={"max_skipped_in_a_row": 2}, hooks={"poison": poison})
    done = run("launch.train", str(config))
    assert done.returncode == 4
    assert "2 steps in a row were skipped" in done.stderr
    assert "loss is not finite in sample 16" in done.stderr, "the log names the sample"
    assert [row["step"] for row in rows(tmp_path / "run")][-1] == 4, "the skipped steps are on record"
