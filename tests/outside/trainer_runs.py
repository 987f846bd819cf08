"""Runs of transformers' Trainer that must all do the same, and what they must do, computed plainly in one process.

As a module it is one rank of a job that does several one after the other:
python -m tests.outside.trainer_runs '[{"out": "folder", "micro_batch": 2}]'.
"""

import json
import os
import runpy
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

from moe.transformers_callback import BalanceExperts
from reweighting.outside import SampleWeigher
from reweighting.reference import ReferenceConfig
from reweighting.transformers_trainer import ReweightedTrainer
from tests.outside.families import experts_of, tiny_model

GLOBAL_BATCH, STEPS, LENGTH = 8, 5, 24
LEARNING_RATE, CLIP_NORM, BIAS_RATE, TEMPERATURE = 3e-3, 0.5, 0.01, 0.3


@dataclass(kw_only=True)
class Run:
    """One training."""

    out: str
    micro_batch: int = 8
    zero_stage: int | None = None
    """None trains without DeepSpeed."""
    steps: int = STEPS
    save_at: int = 0
    resume: bool = False
    rule: str = "sign"
    bf16: bool = False
    dropout: float = 0.0
    reference: str = "minmax"
    """Loss scale of the weights."""
    checkpointing: str = ""
    """Gradient checkpointing: reentrant, plain or none."""
    nan_at: int = -1
    """Step whose gradient is made NaN on the last rank."""
    evaluate: bool = False


def rows(steps: int = STEPS) -> list[dict[str, Tensor]]:
    """Rows of unequal length, padded on the right, easier ones among them: losses differ between samples."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for i in range(steps * GLOBAL_BATCH):
        length = int(torch.randint(6, LENGTH + 1, (), generator=generator))
        ids_T = torch.randint(3, 4 + 7 * (i % 8 + 1), (LENGTH,), generator=generator)
        mask_T = (torch.arange(LENGTH) < length).long()
        labels_T = torch.where(mask_T.bool(), ids_T, -100)
        found.append({"input_ids": ids_T * mask_T, "attention_mask": mask_T, "labels": labels_T})
    return found


def model_of(run: Run) -> nn.Module:
    model = tiny_model("glm4_moe", attention_dropout=run.dropout, attn_implementation="eager")
    with torch.no_grad():  # hidden states with a common direction, as trained models have: experts start uneven
        embeddings = model.get_input_embeddings().weight
        embeddings += 0.05 * torch.randn(embeddings.shape[1], generator=torch.Generator().manual_seed(2))
    return model.to(torch.bfloat16) if run.bf16 else model


class _Recording(ReweightedTrainer):
    """In order, and with everything that is to be compared written down."""

    def __init__(self, *args: Any, run: Run, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.run, self.record = run, {"loss": [], "factors": [], "bias": [], "counts": [], "skipped": []}
        weigh = self.weigher.weigh

        def recording(losses_S: Tensor, tokens_S: Tensor) -> Tensor:
            factors_S = weigh(losses_S, tokens_S)
            self.record["factors"].append(factors_S.tolist())
            self.record["loss"].append(float(self.weigher.metrics["loss/weighted"]))
            return factors_S

        self.weigher.weigh = recording  # type: ignore[method-assign]

    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if self.state.global_step == self.run.nan_at and self.args.process_index == self.args.world_size - 1:
            weight = self.model.get_output_embeddings().weight
            handle = weight.register_hook(lambda gradient: gradient * float("nan"))
            loss = super().training_step(model, inputs, num_items_in_batch)
            handle.remove()
            return loss
        return super().training_step(model, inputs, num_items_in_batch)


class _Watch(TrainerCallback):
    """Writes down what the balancer did; it was added after it."""

    def __init__(self, trainer: _Recording, balance: BalanceExperts) -> None:
        self._trainer, self._balance = trainer, balance

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._balance.balancer is not None
        assert self._balance.last is not None
        record = self._trainer.record
        record["bias"].append([bias_E.tolist() for bias_E in self._balance.balancer.biases.values()])
        record["counts"].append([counts_E.tolist() for counts_E in self._balance.last.counts.values()])
        record["skipped"].append(bool(getattr(kwargs["optimizer"], "step_was_skipped", False)))


def train(run: Run) -> _Recording:
    """Train as `run` says and write losses, factors and biases of this rank to `run.out`."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    _forget_accelerate()
    deepspeed = None
    if run.zero_stage is not None:
        deepspeed = {
            "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto", "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": run.zero_stage}, "bf16": {"enabled": run.bf16},
        }  # fmt: skip
    args = TrainingArguments(
        output_dir=run.out, per_device_train_batch_size=run.micro_batch,
        gradient_accumulation_steps=GLOBAL_BATCH // (run.micro_batch * world), max_steps=run.steps,
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=CLIP_NORM,
        save_strategy="steps" if run.save_at else "no", save_steps=run.save_at or 500, logging_steps=1, report_to=[],
        use_cpu=True, disable_tqdm=True, deepspeed=deepspeed, bf16=run.bf16, seed=3,
        eval_strategy="steps" if run.evaluate else "no", eval_steps=1,
        gradient_checkpointing=bool(run.checkpointing),
        gradient_checkpointing_kwargs={"use_reentrant": run.checkpointing == "reentrant"},
    )  # fmt: skip
    model = model_of(run)
    checkpoint = f"{run.out}/checkpoint-{run.save_at}" if run.resume else None
    if checkpoint is not None and deepspeed is None:
        # transformers 5.23 saves experts one by one and, resuming, leaves out what has other names: load them first.
        model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    balance = BalanceExperts(rule=run.rule, rate=BIAS_RATE)  # type: ignore[arg-type]
    trainer = _Recording(
        model, args, train_dataset=rows(run.steps), eval_dataset=rows(1), callbacks=[balance], run=run,
        weigher=SampleWeigher(temperature=TEMPERATURE, reference=ReferenceConfig(kind=run.reference)),  # type: ignore[arg-type]
    )  # fmt: skip
    trainer.add_callback(_Watch(trainer, balance))
    trainer.train(resume_from_checkpoint=checkpoint)
    rank = int(os.environ.get("RANK", "0"))
    trainer.record["logged"] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    Path(f"{run.out}/rank{rank}{'-resumed' if run.resume else ''}.json").write_text(json.dumps(trainer.record))
    return trainer


def _forget_accelerate() -> None:
    """Accelerate and transformers remember in global state whether DeepSpeed was used before."""
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]


def plain(steps: int = STEPS) -> dict[str, Any]:
    """The same training as plainly as it can be said: one process, one batch, no hook of ours."""
    model = model_of(Run(out="")).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    chosen: dict[str, Tensor] = {}
    for name, experts in experts_of(model).items():
        experts.register_forward_pre_hook(lambda module, args, name=name: chosen.update({name: args[1]}))
    record: dict[str, Any] = {"loss": [], "coefficients": [], "bias": [], "counts": []}
    data = rows(steps)
    for step in range(steps):
        batch = [data[step * GLOBAL_BATCH + i] for i in range(GLOBAL_BATCH)]
        ids_BT, mask_BT, labels_BT = (
            torch.stack([row[key] for row in batch]) for key in ("input_ids", "attention_mask", "labels")
        )
        logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT).logits
        lengths_B = mask_BT.sum(dim=1)
        losses = [
            F.cross_entropy(logits_BTV[i, : lengths_B[i] - 1], labels_BT[i, 1 : lengths_B[i]])
            for i in range(GLOBAL_BATCH)
        ]
        losses_B = torch.stack(losses)
        low, high = losses_B.detach().min(), losses_B.detach().max()
        h_B = (2 * losses_B.detach() - low - high) / (high - low)
        weights_B = ((h_B + 1).clamp(max=1) / TEMPERATURE).softmax(dim=0)  # linupper
        coefficients_B = weights_B * (lengths_B - 1) / (weights_B * (lengths_B - 1)).sum()
        loss = (coefficients_B * losses_B).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        counts = [chosen_NK[mask_BT.flatten().bool()].flatten().bincount(minlength=8) for chosen_NK in chosen.values()]
        gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
        for gate, counts_E in zip(gates, counts, strict=True):
            gate.e_score_correction_bias += BIAS_RATE * (counts_E.float().mean() - counts_E).sign()
        record["loss"].append(float(loss.detach()))
        record["coefficients"].append(coefficients_B.tolist())
        record["counts"].append([counts_E.tolist() for counts_E in counts])
        record["bias"].append([gate.e_score_correction_bias.tolist() for gate in gates])
    return record


def order_of(run: Run, world: int, rank: int) -> list[int]:
    """Which rows of a step rank `rank` sees, in its order: micro-batches are dealt in turn."""
    m = run.micro_batch
    starts = range(rank * m, GLOBAL_BATCH, world * m)
    return [start + i for start in starts for i in range(m)]


def job(*runs: Run | str) -> str:
    """The runs, or paths of programs, as the one argument of this module."""
    return json.dumps([run if isinstance(run, str) else asdict(run) for run in runs])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for settings in json.loads(sys.argv[1]):
        if isinstance(settings, str):
            runpy.run_path(settings)
            continue
        Path(settings["out"]).mkdir(parents=True, exist_ok=True)
        train(Run(**settings))
