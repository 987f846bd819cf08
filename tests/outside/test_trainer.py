"""Both hooks under transformers' Trainer, with and without DeepSpeed, equal a plain loop however the batch is cut."""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")

from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

from moe.foreign_routers import find_routers
from moe.transformers_callback import BalanceExperts
from reweighting.outside import SampleWeigher
from reweighting.transformers_trainer import ReweightedTrainer
from tests.outside.conftest import TwoRanks, run_job
from tests.outside.families import tiny_model
from tests.outside.trainer_runs import GLOBAL_BATCH, STEPS, Run, job, order_of, plain, train
from trainer.errors import ConfigError


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


def test_two_ranks_with_and_without_deepspeed(two_ranks: TwoRanks, reference: dict[str, Any]) -> None:
    for name in ("ddp", "zero2"):
        check(Run(out=str(two_ranks.folder / name), micro_batch=2), 2, reference)


@pytest.mark.slow
def test_every_cut_and_stage(tmp_path: Path, reference: dict[str, Any]) -> None:
    runs = [cut(tmp_path, m, stage) for m in (4, 2, 1) for stage in (None, 0, 1, 2, 3)]
    run_job(job(*runs), ranks=2)
    for run in runs:
        check(run, 2, reference)
    alone = tmp_path / "alone"
    alone.mkdir()
    runs = [cut(alone, m, stage) for m in (8, 1) for stage in (1, 2)]
    run_job(job(*runs), ranks=1)
    for run in runs:
        check(run, 1, reference)


def bits(record: dict[str, Any], first: int = 0) -> dict[str, Any]:
    return {key: record[key][first:] for key in ("loss", "bias", "counts")}


def test_resumed_equals_unbroken(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"micro_batch": 4, "rule": "smebu", "reference": "running", "dropout": 0.1}
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole = Run(out=str(tmp_path / "whole"), steps=6, **settings)
    train(whole)
    first = Run(out=str(tmp_path / "broken"), steps=4, save_at=3, **settings)
    train(first)
    second = Run(out=first.out, steps=6, save_at=3, resume=True, **settings)
    train(second)
    unbroken, half, rest = records(whole, 1)[0], records(first, 1)[0], records(second, 1, "-resumed")[0]
    assert bits(half) == {key: value[:4] for key, value in bits(unbroken).items()}
    assert bits(rest) == bits(unbroken, first=3)
    assert len(rest["loss"]) == 3


@pytest.mark.parametrize("restore", [False, True])
def test_the_callback_alone_resumes_with_and_without_transformers_own_restoring(tmp_path: Path, restore: bool) -> None:
    def biases(folder: str, steps: int, checkpoint: str | None = None) -> list[list[float]]:
        torch.manual_seed(0)
        model = tiny_model("minimax_m2")
        if checkpoint is not None:
            model = AutoModelForCausalLM.from_pretrained(checkpoint)
        args = TrainingArguments(
            str(tmp_path / folder), per_device_train_batch_size=2, max_steps=steps, save_strategy="steps", save_steps=2,
            report_to=[], use_cpu=True, disable_tqdm=True, restore_callback_states_from_checkpoint=restore,
            lr_scheduler_type="constant",
        )  # fmt: skip
        ids = torch.randint(3, 60, (12, 16), generator=torch.Generator().manual_seed(1))
        balance = BalanceExperts(rule="smebu", rate=0.01, kappa=3.0)
        Trainer(model, args, train_dataset=[{"input_ids": x, "labels": x} for x in ids], callbacks=[balance]).train(
            resume_from_checkpoint=checkpoint
        )
        return [router.bias_E.tolist() for router in find_routers(model)]

    unbroken = biases("whole", 4)
    biases("broken", 2)
    assert biases("broken", 4, str(tmp_path / "broken" / "checkpoint-2")) == unbroken


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_resumed_equals_unbroken_under_deepspeed(tmp_path: Path, bf16: bool) -> None:
    settings: dict[str, Any] = {"micro_batch": 2, "zero_stage": 2, "bf16": bf16, "rule": "pid", "reference": "running"}
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole = Run(out=str(tmp_path / "whole"), steps=6, **settings)
    first = Run(out=str(tmp_path / "broken"), steps=4, save_at=3, **settings)
    second = Run(out=first.out, steps=6, save_at=3, resume=True, **settings)
    run_job(job(whole, first), ranks=2)
    run_job(job(second), ranks=2)
    for rank in range(2):
        unbroken, rest = records(whole, 2)[rank], records(second, 2, "-resumed")[rank]
        assert bits(rest) == bits(unbroken, first=3)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_a_skipped_step_moves_no_bias(tmp_path: Path, bf16: bool) -> None:
    run = cut(tmp_path, 2, zero_stage=1, nan_at=2, bf16=bf16)
    run_job(job(run), ranks=2)
    for record in records(run, 2):
        assert record["skipped"] == [False, False, True, False, False]
        assert record["bias"][2] == record["bias"][1]
        assert record["bias"][3] != record["bias"][2]


def test_dropout_draws_the_same_masks_in_both_passes(tmp_path: Path) -> None:
    """The loss that is weighted in the second pass is the loss that the weights were made from."""
    run = cut(tmp_path, 4, dropout=0.5)
    record = train(run).record
    assert record["logged"] == pytest.approx(record["loss"], rel=1e-6)
    assert train(cut(tmp_path, 2, dropout=0.5)).record["loss"] != pytest.approx(record["loss"], rel=1e-6)


def test_settings_with_another_loss_are_refused(tmp_path: Path) -> None:
    model = tiny_model("glm4_moe")
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], label_smoothing_factor=0.1)
    with pytest.raises(ConfigError, match="not with label_smoothing_factor"):
        ReweightedTrainer(model, args, weigher=SampleWeigher())
    model.config.output_router_logits = True
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ConfigError, match="output_router_logits, an auxiliary loss"):
        ReweightedTrainer(model, args, weigher=SampleWeigher())


@pytest.mark.parametrize("module", ["moe.transformers_callback", "reweighting.transformers_trainer"])
def test_a_missing_transformers_is_said_plainly(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, module)
    with pytest.raises(ImportError, match=rf"{module} needs transformers: pip install 'transformers\[torch\]>=5'"):
        import_module(module)


def test_a_model_without_such_routers_is_refused_when_the_trainer_is_built(tmp_path: Path) -> None:
    model = MixtralForCausalLM(
        MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                      num_key_value_heads=1, num_local_experts=4)
    )  # fmt: skip
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ConfigError, match="MixtralForCausalLM has no router with a selection bias"):
        Trainer(model, args, callbacks=[BalanceExperts()])
