"""Ranks that no longer train the same model are noticed after some steps, at the latest before the next checkpoint, and
nothing is saved of them."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.dist.test_resume import assert_same_run
from tests.harness import losses, run, run_trainings, tiny_config
from trainer.data.config import DataConfig
from trainer.divergence import checksum

EP = ["engine.zero_stage=1", "engine.expert_parallel_size=2", "train.micro_batch_size=1"]
CASES = {
    # name: ranks, overrides, tensor, rank it is altered on, after which step, what it is compared with, step it is found at
    "a parameter, at a save": (2, ["train.verify_every=0"], "embedding.weight", 1, 5, 0, 8),
    "a parameter, between saves": (2, ["train.verify_every=3"], "embedding.weight", 1, 5, 0, 6),
    # With ZeRO the next step gathers every copy anew from the rank that owns it.
    "an expert's copy": (4, EP, "blocks.1.mlp.experts.down", 3, 8, 1, 8),
}


@pytest.mark.fault(14, "a parameter altered on one rank, looked for every 3 steps")
@pytest.mark.parametrize("case", CASES)
def test_a_silent_error_on_one_rank_ends_the_run(case: str, tmp_path: Path, data_config: DataConfig) -> None:
    ranks, overrides, tensor, rank, after, reference, step = CASES[case]
    error = {"hook": "tests.dist.hooks:SilentError", "tensor": tensor, "step": after, "rank": rank}
    config = tiny_config(tmp_path, data_config, hooks={"error": error})
    done = run("launch.train", str(config), *overrides, ranks=ranks)
    assert done.returncode == 4, done.stderr[-2000:]
    message = f"step {step}: {tensor} on rank {rank} differs from its copy on rank {reference}; nothing was saved"
    assert message in done.stderr
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").glob("*")]
    assert saved == ["step-00000004"], "the one from before the error is kept, no other is there"
    assert len(losses(tmp_path / "run")) == step, "its row is the last"


def test_looking_changes_nothing(tmp_path: Path, data_config: DataConfig) -> None:
    config = tiny_config(tmp_path, data_config, model={"dropout": 0.1})
    often, never = tmp_path / "often", tmp_path / "never"
    run_trainings(
        [(config, [f"run_dir={often}", "train.verify_every=1"]), (config, [f"run_dir={never}", "train.verify_every=0"])],
        ranks=2,
    )
    assert_same_run(often, never)


def test_hook_state_that_differs_between_ranks_is_never_saved(tmp_path: Path, data_config: DataConfig) -> None:
    config = tiny_config(tmp_path, data_config, hooks={"local": {"hook": "tests.dist.hooks:RankLocalState"}})
    done = run("launch.train", str(config), ranks=2)
    assert done.returncode == 4
    assert "hook state on rank 1 differs from rank 0" in done.stderr
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


@given(at=st.integers(0, 19), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))
def test_a_checksum_sees_one_changed_number(at: int, dtype: torch.dtype) -> None:
    tensor = torch.arange(20).to(dtype)
    changed = tensor.clone()
    changed[at] += 1
    assert checksum(tensor) != checksum(changed)
    assert checksum(tensor) == checksum(tensor.clone())
