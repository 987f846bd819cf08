"""How gradients are put together before they are reduced changes no number, nor does leaving out what one rank need not."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.harness import deterministic, run, run_trainings, tiny_config
from trainer.data.config import DataConfig

CASES = {
    "fp32 ZeRO 1": "engine={zero_stage: 1}",
    "bf16 ZeRO 2": "engine={zero_stage: 2, precision: bf16}",
    "fp32 ZeRO 2 EP 2": "engine={zero_stage: 2, expert_parallel_size: 2}",
    "fp32 ZeRO 3": "engine={zero_stage: 3, zero_options: {stage3_param_persistence_threshold: 0}}",
}
BUCKETS = (0, 64, 50_000_000)  # as chosen, one for almost every parameter, one for all


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data_config: DataConfig) -> Path:
    """Four steps of each case with each bucket, on two ranks."""
    folder = tmp_path_factory.mktemp("buckets")
    config = tiny_config(
        folder, data_config, train={"steps": 4}, evaluation={"every": 0}, checkpoint={"every": 0},
    )  # fmt: skip
    plan = [
        (config, [case, f"engine.bucket_elements={bucket}", f"run_dir={folder / name}-{bucket}"])
        for name, case in CASES.items()
        for bucket in BUCKETS
    ]
    run_trainings(plan, ranks=2)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_the_bucket_changes_no_number(runs: Path, case: str) -> None:
    chosen, *others = (deterministic(runs / f"{case}-{bucket}") for bucket in BUCKETS)
    assert len(chosen) > 4
    assert all(other == chosen for other in others)


def test_a_parameter_without_gradient_decays_alike_on_one_rank_and_on_two(
    tmp_path: Path, data_config: DataConfig
) -> None:
    config = tiny_config(tmp_path, data_config, train={"steps": 4}, evaluation={"every": 0}, checkpoint={"every": 0})
    for ranks in (1, 2):
        run_trainings([(config, [f"run_dir={tmp_path}/{ranks}"])], ranks=ranks, seam="idle_parameter")
    idle = [
        safetensors.torch.load_file(tmp_path / str(ranks) / "checkpoints/step-00000004/model.safetensors")["idle"]
        for ranks in (1, 2)
    ]
    assert torch.equal(*idle)
    assert (idle[0] < 1).all(), "weight decay"


def test_bf16_gradients_add_up_over_ranks_as_exactly_as_asked() -> None:
    done = run("tests.dist.reduced_gradients", ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines() if line[:1].isdigit()]  # DeepSpeed may print too
    errors = {(stage, kind): float(off) for stage, kind, off in lines}
    assert len(errors) == 6
    for (_, kind), off in errors.items():
        assert off < 1e-6 if kind == "fp32" else 5e-4 < off < 1e-2
