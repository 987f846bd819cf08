"""Loss-based sample weights under transformers' Trainer, exact under gradient accumulation and over ranks.

    ReweightedTrainer(model, args, train_dataset=..., weigher=SampleWeigher(strategy="linupper", temperature=0.5))

The Trainer fetches all micro-batches of an optimizer step before it works on them. With several, they are forwarded
once more, without gradients, to know all losses of the step first; random numbers are replayed, so dropout draws the
same masks. With one micro-batch a step nothing is forwarded twice. A sample is a row of the batch.

For other trainers (TRL's SFTTrainer ...) put `ReweightedLoss` before them: class Mine(ReweightedLoss, SFTTrainer).

The only module of reweighting that imports transformers.

Shape letters: b samples of a micro-batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reweighting.outside import SampleWeigher, sample_losses
from trainer.errors import ConfigError

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError(
        "reweighting.transformers_trainer needs transformers: pip install 'transformers[torch]>=5'"
    ) from error

_KEY = "evenkeel_planned"
_STATE = "evenkeel.SampleWeigher"


@dataclass(frozen=True)
class _Planned:
    """What the first pass found out about a micro-batch; it travels with the batch."""

    factors_b: Tensor
    random: list[Tensor]


class ReweightedLoss:
    """Mixin before a Trainer: its training loss is the weighted one; evaluation is as it was.

    Raises ConfigError for settings whose loss would silently be another one.
    """

    loss_is_scaled_for_ga = True  # the factors are normalised over the whole step: nothing is to be divided any more

    def __init__(self, *args: Any, weigher: SampleWeigher, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weigher = weigher
        _refuse(self)
        self.add_callback(_Steps(weigher))  # type: ignore[attr-defined]

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Fetch the micro-batches of a step and, if there are several, weigh their samples at once."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        if len(batches) > 1:
            self._plan(batches)
        return batches, num_items

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The micro-batch's part of the objective: summed over micro-batches and averaged over ranks, it is the loss."""
        if not model.training:
            return super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        planned: _Planned | None = inputs.pop(_KEY, None)
        if planned is not None:
            _set_random(planned.random)
        losses_b, tokens_b, outputs = _forward(model, inputs)
        factors_b = self.weigher.weigh(losses_b, tokens_b) if planned is None else planned.factors_b
        loss = (factors_b * losses_b).sum()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the weights of the last step beside the loss, which is the weighted one."""
        if "loss" in logs:
            logs |= {
                name if "/" in name else f"{name}/unweighted": float(value)
                for name, value in self.weigher.metrics.items()
            }
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _plan(self, batches: list[Any]) -> None:
        model = self.model_wrapped  # type: ignore[attr-defined]
        model.train()
        found, random = [], []
        with torch.no_grad(), self.compute_loss_context_manager():  # type: ignore[attr-defined]
            for batch in batches:
                random.append(_get_random())
                found.append(_forward(model, dict(self._prepare_inputs(batch)))[:2])  # type: ignore[attr-defined]
        factors = self.weigher.weigh(torch.cat([losses for losses, _ in found]), torch.cat([n for _, n in found]))
        for batch, factors_b, state in zip(batches, factors.split([len(n) for _, n in found]), random, strict=True):
            batch[_KEY] = _Planned(factors_b, state)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        saved = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in self.weigher.state_dict().items()}
        self.state.stateful_callbacks[_STATE] = saved  # type: ignore[attr-defined]
        super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]


class ReweightedTrainer(ReweightedLoss, Trainer):
    """transformers' Trainer with weighted samples; `weigher` is its one new argument."""


class _Steps(TrainerCallback):
    """Tells the weigher how long the run is and what became of each step."""

    def __init__(self, weigher: SampleWeigher) -> None:
        self._weigher = weigher

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._weigher.total_steps = state.max_steps
        if _STATE in state.stateful_callbacks:
            self._weigher.load_state_dict(state.stateful_callbacks[_STATE])

    def on_step_end(self, args: Any, state: Any, control: Any, *, optimizer: Any, **kwargs: Any) -> None:
        self._weigher.step(applied=not getattr(optimizer, "step_was_skipped", False))


def _forward(model: Any, inputs: Any) -> tuple[Tensor, Tensor, Any]:
    """Losses and target tokens of each row, and the model's outputs."""
    labels, shifted = inputs.pop("labels", None), inputs.pop("shift_labels", None)
    if labels is None and shifted is None:
        raise ConfigError("reweighting: a training batch has no labels; use a collator that makes them")
    outputs = model(**inputs)
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    losses_b, tokens_b = sample_losses(logits, labels if shifted is None else shifted, shifted=shifted is not None)
    return losses_b, tokens_b, outputs


def _refuse(trainer: Any) -> None:
    args, config = trainer.args, getattr(trainer.model, "config", None)
    reasons = {
        "label_smoothing_factor": args.label_smoothing_factor != 0,
        "compute_loss_func": trainer.compute_loss_func is not None,
        "use_liger_kernel, which gives no logits": args.use_liger_kernel,
        "several GPUs in one process; start it with torchrun": args.n_gpu > 1,
        "model.config.output_router_logits, an auxiliary loss": getattr(config, "output_router_logits", False),
        "a model that is not causal": not getattr(trainer, "_loss_shifts_labels", True),
        "a Trainer without loss_is_scaled_for_ga; update transformers": not hasattr(Trainer, "loss_is_scaled_for_ga"),
    }
    problems = [f"reweighting: not with {reason}" for reason, found in reasons.items() if found]
    if problems:
        raise ConfigError(*problems)


def _get_random() -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def _set_random(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])
