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
from dataclasses import dataclass, field
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


@dataclass
class _Plan:
    """The micro-batches of a step, and what the first pass found out about them."""

    batches: list[Any]
    factors: list[Tensor] = field(default_factory=list)
    random: list[list[Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class _Place:
    """Which micro-batch of which step a batch is; it travels with the batch."""

    plan: _Plan
    index: int


class ReweightedLoss:
    """Mixin before a Trainer: its training loss is the weighted one; evaluation is as it was.

    Raises ConfigError for settings whose loss would silently be another one.
    """

    # The factors are normalised over the whole step: the Trainer is not to divide by the number of micro-batches.
    loss_is_scaled_for_ga: bool | None = True

    def __init__(self, *args: Any, weigher: SampleWeigher, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weigher = weigher
        _refuse(self)
        self.add_callback(_Steps(weigher))  # type: ignore[attr-defined]

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Fetch the micro-batches of a step and, if there are several, let them know of each other."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        # The first pass itself waits for the first training step: resuming, the Trainer restores random states between.
        if len(batches) > 1:
            plan = _Plan([dict(batch) for batch in batches])
            for i, batch in enumerate(batches):
                batch[_KEY] = _Place(plan, i)
        return batches, num_items

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The micro-batch's part of the objective, which is its sum over micro-batches, averaged over ranks."""
        if not model.training:
            return super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        place: _Place | None = inputs.pop(_KEY, None)
        if place is not None:
            if not place.plan.factors:
                self._first_pass(model, place.plan)
            _set_random(place.plan.random[place.index])
        losses_b, tokens_b, outputs = _forward(model, inputs)
        factors_b = self.weigher.weigh(losses_b, tokens_b) if place is None else place.plan.factors[place.index]
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

    @torch.no_grad()
    def _first_pass(self, model: Any, plan: _Plan) -> None:
        """Forward all micro-batches of the step for their losses, and weigh the samples."""
        losses, tokens = [], []
        for batch in plan.batches:
            plan.random.append(_get_random())
            losses_b, tokens_b, _ = _forward(model, self._prepare_inputs(batch))  # type: ignore[attr-defined]
            losses.append(losses_b)
            tokens.append(tokens_b)
        factors_S = self.weigher.weigh(torch.cat(losses), torch.cat(tokens))
        plan.factors = list(factors_S.split([len(tokens_b) for tokens_b in tokens]))
        plan.batches = []

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
        self._weigher.start(total_steps=state.max_steps)
        if _STATE in state.stateful_callbacks:
            self._weigher.load_state_dict(state.stateful_callbacks[_STATE])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._weigher.step(applied=not getattr(kwargs["optimizer"], "step_was_skipped", False))


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
        "tensor, context or sequence parallelism: ranks must hold different samples": any(
            getattr(trainer, f"get_{kind}_size", lambda: 1)() > 1 for kind in ("tp", "cp", "sp")
        ),
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
