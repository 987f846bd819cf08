"""Forward and backward of one optimizer step over the global batch, exactly, however the batch is cut.

The objective is sum_i c_i l_i over all B samples of the step (ranks x micro-batches): l_i is the mean
cross-entropy of sample i, and the coefficients c_i, which sum to one, come from the sample weights and the
normalisation. No rank ever normalises by something only it knows.

Three ways to get there, chosen by what the hooks need (algorithms: Sow et al. 2025, arXiv 2502.06733):
- `streaming`: nobody needs losses before the backward: forward and backward each micro-batch in turn.
- `deferred`: M forwards that keep their graphs, the hooks set weights, M backwards. No extra FLOPs; M x activations.
- `two_pass`: M forwards without graphs, weights, then forward + backward each, with the random state of the
  first pass replayed so that dropout draws the same masks.

A model may return, beside its token losses [b, T], features [b, X] of a penalty and statistics [Y] of the micro-batch.
The objective then also has the mean over all B samples of features @ c, with c = model.penalty_coefficients(statistics
summed over the step). A model whose c depends on the statistics says `needs_whole_step` and is not run in `streaming`.

One all-gather of five numbers a sample per step shows every rank the whole batch (two in `streaming`, which
must know the token counts first). It also carries the stop request, so agreeing to stop costs nothing.

Shape letters: B samples of the step, b of a micro-batch, S of this rank, M micro-batches, T sequence, W ranks,
X features, Y statistics.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from trainer import ranks
from trainer.data.loader import MicroBatch
from trainer.engine import Engine
from trainer.hooks import HookList, Recorder, StepContext

AccumulationMode = Literal["streaming", "deferred", "two_pass"]
Normalization = Literal["samples", "tokens"]

IGNORED_LABEL = -100


def loss_coefficients(tokens_B: Tensor, weights_B: Tensor | None, normalization: Normalization) -> Tensor:
    """Factor c_i of each sample's mean loss in the objective, float64 [B]; they sum to one over valid samples.

    `samples`: c_i = w_i, every sample counts by its weight whatever its length.
    `tokens`: c_i = w_i n_i / sum_j w_j n_j, every token of a sample counts by the sample's weight.
    Without weights w_i is uniform over samples with at least one target token; if there is none, all are zero.
    """
    tokens_B = tokens_B.double()
    share_B = (tokens_B > 0).double() if weights_B is None else weights_B.double()
    if normalization == "tokens":
        share_B = share_B * tokens_B
    total = share_B.sum()
    return torch.where(total > 0, share_B / total.clamp(min=torch.finfo(torch.float64).tiny), 0.0)


def sample_losses(token_losses_bT: Tensor, tokens_b: Tensor) -> Tensor:
    """Mean cross-entropy of each sample over its target tokens, float32 [b]; 0 for a sample without any."""
    return token_losses_bT.float().sum(dim=1) / tokens_b.clamp(min=1)


class Forwarded(NamedTuple):
    """What one forward gave."""

    loss_b: Tensor
    features_bX: Tensor | None
    statistics_Y: Tensor | None


class GlobalBatch(NamedTuple):
    """The step as every rank sees it, rows sorted by sample id."""

    sample_ids_B: Tensor
    domains_B: Tensor
    tokens_B: Tensor
    losses_B: Tensor
    stop: Tensor  # bool scalar: some rank was asked to stop


@dataclass(frozen=True)
class AccumulatedStep:
    """A step whose gradients are in place, or one that must be skipped."""

    context: StepContext
    coefficients_B: Tensor
    skip_reason: str
    """Why there is nothing to apply; empty if there is."""
    stop_requested: bool


class Accumulator:
    """Runs the micro-batches of one step through the engine."""

    def __init__(
        self,
        engine: Engine,
        hooks: HookList,
        *,
        mode: AccumulationMode,
        normalization: Normalization,
        device: torch.device,
    ) -> None:
        assert mode != "streaming" or not hooks.needs_batch_losses, "a hook needs the losses before the backward"
        assert mode != "streaming" or not getattr(engine.module, "needs_whole_step", False)
        self._engine = engine
        self._hooks = hooks
        self._mode = mode
        self._normalization = normalization
        self._device = device

    def run(
        self, micro_batches: Sequence[MicroBatch], *, step: int, applied_steps: int, recorder: Recorder, stop: bool
    ) -> AccumulatedStep:
        """Accumulate the gradient of one step; `stop` tells that this rank was asked to end the run."""
        batches = [batch.to(self._device) for batch in micro_batches]
        tokens = [(batch.labels_bT != IGNORED_LABEL).sum(dim=1) for batch in batches]
        last = len(batches) - 1
        objective: _Objective | None = None
        generators: list[_RandomState] = []
        waiting: list[Forwarded] = []  # forwards whose backward is still to come
        losses: list[Tensor] = []
        statistics: list[Tensor] = []

        if self._mode == "streaming":
            known = self._gather(batches, tokens, [n.new_zeros(n.shape) for n in tokens], stop=stop)
            objective = self._objective(loss_coefficients(known.tokens_B, None, self._normalization), statistics, step)
        for m, (batch, tokens_b) in enumerate(zip(batches, tokens, strict=True)):
            if self._mode == "two_pass":
                generators.append(_RandomState.now(self._device))
            with torch.set_grad_enabled(self._mode != "two_pass"):
                forwarded = self._forward(batch, tokens_b)
            losses.append(forwarded.loss_b.detach())
            if forwarded.statistics_Y is not None:
                statistics.append(forwarded.statistics_Y)
            if objective is not None and m < last:
                self._engine.backward(objective(forwarded, batch), last=False)
            elif self._mode != "two_pass":
                waiting.append(forwarded)

        batch_B = self._gather(batches, tokens, losses, stop=stop)
        context = StepContext(
            step=step,
            applied_steps=applied_steps,
            sample_ids_B=batch_B.sample_ids_B,
            domains_B=batch_B.domains_B,
            tokens_B=batch_B.tokens_B,
            losses_B=batch_B.losses_B,
            recorder=recorder,
        )
        skip_reason, stop_requested = self._verdict(batch_B)
        if not skip_reason:
            self._hooks.on_losses(context)
        if objective is None:
            coefficients_B = loss_coefficients(context.tokens_B, context.weights_B, self._normalization)
            objective = self._objective(coefficients_B, statistics, step)
        done = AccumulatedStep(context, objective.coefficients_B, skip_reason, stop_requested)

        if skip_reason:
            if self._mode == "streaming" and last > 0:
                self._engine.abandon(waiting[0].loss_b.sum())
            return done
        for m, (batch, tokens_b) in enumerate(zip(batches, tokens, strict=True)):
            if self._mode == "two_pass":
                generators[m].restore(self._device)
                self._engine.backward(objective(self._forward(batch, tokens_b), batch), last=m == last)
            elif self._mode == "deferred" or m == last:
                self._engine.backward(objective(waiting.pop(0), batch), last=m == last)
        if objective.penalty is not None:
            recorder.record(self._engine.module.penalty_name, objective.penalty, "sum")  # type: ignore[arg-type]
        return done

    def _forward(self, batch: MicroBatch, tokens_b: Tensor) -> Forwarded:
        output = self._engine.forward(batch.tokens_bT, batch.labels_bT, batch.documents_bT)
        if isinstance(output, Tensor):
            return Forwarded(sample_losses(output, tokens_b), None, None)
        token_losses_bT, features_bX, statistics_Y = output
        return Forwarded(sample_losses(token_losses_bT, tokens_b), features_bX, statistics_Y)

    def _objective(self, coefficients_B: Tensor, statistics: Sequence[Tensor], step: int) -> "_Objective":
        module: Any = self._engine.module
        penalty_X = None
        if hasattr(module, "penalty_coefficients"):
            total_Y = None
            if module.needs_whole_step:
                total_Y = ranks.all_reduce_(torch.stack(list(statistics)).sum(dim=0))
            penalty_X = module.penalty_coefficients(total_Y)
        return _Objective(coefficients_B, penalty_X, step)

    def _gather(
        self, batches: Sequence[MicroBatch], tokens: Sequence[Tensor], losses: Sequence[Tensor], *, stop: bool
    ) -> GlobalBatch:
        columns_S5 = torch.stack(
            [
                torch.cat([batch.sample_ids_b for batch in batches]).double(),
                torch.cat([batch.domains_b for batch in batches]).double(),
                torch.cat(list(tokens)).double(),
                torch.cat(list(losses)).double(),
                torch.full((sum(n.numel() for n in tokens),), float(stop), dtype=torch.float64, device=self._device),
            ],
            dim=1,
        )
        # float64 holds ids up to 2^53 and float32 losses exactly, so one tensor and one collective carry all.
        rows_B5 = ranks.all_gather(columns_S5).flatten(0, 1)
        rows_B5 = rows_B5[rows_B5[:, 0].argsort()]
        ids_B, domains_B, tokens_B, losses_B, stop_B = rows_B5.unbind(dim=1)
        return GlobalBatch(ids_B.long(), domains_B.long(), tokens_B.long(), losses_B.float(), stop_B.any())

    def _verdict(self, batch: GlobalBatch) -> tuple[str, bool]:
        """Whether to skip, and whether to stop: the one place of a step where the host waits for the device."""
        finite_B = torch.isfinite(batch.losses_B)
        all_finite, any_tokens, stop = torch.stack([finite_B.all(), (batch.tokens_B > 0).any(), batch.stop]).tolist()
        if not all_finite:
            bad = batch.sample_ids_B[~finite_B].tolist()
            shown = ", ".join(map(str, bad[:8])) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
            return f"loss is not finite in sample {shown}", stop
        return ("" if any_tokens else "no sample has a target token"), stop


class _Objective:
    """One step's objective, once its coefficients are known: turns a forward into this rank's share of it."""

    def __init__(self, coefficients_B: Tensor, penalty_X: Tensor | None, step: int) -> None:
        self.coefficients_B = coefficients_B
        self.penalty: Tensor | None = None
        """Value of the penalty so far, on this rank."""
        self._penalty_X = penalty_X
        # Samples of a step are consecutive ids, and the global view is sorted by id: position is a subtraction.
        self._first_id = (step - 1) * coefficients_B.numel()

    def __call__(self, forwarded: Forwarded, batch: MicroBatch) -> Tensor:
        own_b = self.coefficients_B[batch.sample_ids_b - self._first_id]
        share = (forwarded.loss_b * own_b.to(forwarded.loss_b.dtype)).sum()
        if forwarded.features_bX is not None and self._penalty_X is not None:
            penalty = (forwarded.features_bX @ self._penalty_X).sum() / self.coefficients_B.numel()
            self.penalty = penalty.detach() if self.penalty is None else self.penalty + penalty.detach()
            share = share + penalty
        return share


class _RandomState(NamedTuple):
    """State of the generators that dropout draws from."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> "_RandomState":
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def restore(self, device: torch.device) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)
