"""Ranks that no longer train the same model are noticed before the next checkpoint, and nothing is saved of them."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.harness import run, tiny_config
from trainer.data.config import DataConfig
from trainer.divergence import checksum

EP = ["engine.zero_stage=1", "engine.expert_parallel_size=2", "train.micro_batch_size=1"]
CASES = {
    # name: ranks, overrides, tensor, rank it is altered on, what it is compared with
    "a parameter": (2, [], "embedding.weight", 1, 0),
    "an expert's copy": (4, EP, "blocks.1.mlp.experts.down", 3, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_a_silent_error_on_one_rank_ends_the_run(case: str, tmp_path: Path, data_config: DataConfig) -> None:
    ranks, overrides, tensor, rank, reference = CASES[case]
    error = {"hook": "tests.dist.hooks:SilentError", "tensor": tensor, "step": 8, "rank": rank}
    config = tiny_config(tmp_path, data_config, hooks={"error": error})
    done = run("launch.train", str(config), *overrides, ranks=ranks)
    assert done.returncode == 4, done.stderr[-2000:]
    message = f"step 8: {tensor} on rank {rank} differs from its copy on rank {reference}; nothing was saved"
    assert message in done.stderr
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").glob("*")]
    assert saved == ["step-00000004"], "the one from before the error is kept, no other is there"


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
