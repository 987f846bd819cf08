"""Both hooks under transformers' Trainer, with and without DeepSpeed, equal a plain loop however the batch is cut."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")

from tests.harness import run as run_module
from tests.outside.trainer_runs import GLOBAL_BATCH, STEPS, Run, job, order_of, plain, train


def run_job(*runs: Run, ranks: int) -> None:
    done: subprocess.CompletedProcess[str] = run_module(
        "tests.outside.trainer_runs", job(*runs), ranks=ranks, DS_ACCELERATOR="cpu"
    )
    assert done.returncode == 0, done.stderr[-4000:]


def records(run: Run, ranks: int, suffix: str = "") -> list[dict[str, Any]]:
    return [json.loads(Path(f"{run.out}/rank{rank}{suffix}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return plain()


def check(run: Run, ranks: int, reference: dict[str, Any]) -> None:
    """Losses to 1e-5, weights to 1e-4 relative, loads and biases exactly."""
    all_ranks = records(run, ranks)
    factors = torch.zeros(STEPS, GLOBAL_BATCH, dtype=torch.float64)
    for rank, record in enumerate(all_ranks):
        assert record["loss"] == pytest.approx(reference["loss"], rel=1e-5)
        assert record["logged"] == pytest.approx(reference["loss"], rel=1e-5)
        assert record["counts"] == reference["counts"]
        assert record["bias"] == reference["bias"]
        own = torch.tensor(record["factors"], dtype=torch.float64).reshape(STEPS, -1)
        factors[:, order_of(run, ranks, rank)] = own / ranks
    expected = torch.tensor(reference["coefficients"], dtype=torch.float64)
    torch.testing.assert_close(factors, expected, rtol=1e-4, atol=0)


def cut(folder: Path, micro_batch: int, zero_stage: int | None = None, **settings: Any) -> Run:
    out = folder / f"{micro_batch}-{zero_stage}-{'-'.join(map(str, settings.values()))}"
    out.mkdir()
    return Run(out=str(out), micro_batch=micro_batch, zero_stage=zero_stage, **settings)


@pytest.mark.parametrize(
    ("micro_batch", "settings"),
    [
        (8, {}),
        (2, {}),
        (4, {"checkpointing": "reentrant"}),
        (4, {"checkpointing": "plain", "evaluate": True}),
    ],
)
def test_one_process(tmp_path: Path, micro_batch: int, settings: dict[str, Any], reference: dict[str, Any]) -> None:
    run = cut(tmp_path, micro_batch, **settings)
    train(run)
    check(run, 1, reference)


def test_two_ranks_with_and_without_deepspeed(tmp_path: Path, reference: dict[str, Any]) -> None:
    runs = [cut(tmp_path, 2), cut(tmp_path, 2, zero_stage=2)]
    run_job(*runs, ranks=2)
    for run in runs:
        check(run, 2, reference)


@pytest.mark.slow
def test_every_cut_and_stage(tmp_path: Path, reference: dict[str, Any]) -> None:
    runs = [cut(tmp_path, m, stage) for m in (4, 2, 1) for stage in (None, 0, 1, 2, 3)]
    run_job(*runs, ranks=2)
    for run in runs:
        check(run, 2, reference)
    alone = tmp_path / "alone"
    alone.mkdir()
    runs = [cut(alone, m, stage) for m in (8, 1) for stage in (1, 2)]
    run_job(*runs, ranks=1)
    for run in runs:
        check(run, 1, reference)
