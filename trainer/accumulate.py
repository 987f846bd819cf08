"""Forward and backward of one optimizer step over the global batch, exactly, however the batch is cut.

The objective (trainer/objective.py) is sum_i c_i l_i over all B samples of the step, ranks x micro-batches. How to get
there depends on what the hooks need (Sow et al. 2025, arXiv 2502.06733):

- `streaming`: nobody needs losses before the backward: forward and backward each micro-batch in turn.
- `deferred`: M forwards that keep their graphs, the hooks set weights, M backwards. No extra FLOPs; M x activations.
- `two_pass`: M forwards without graphs, weights, then forward + backward each, with the random state of the
  first pass replayed so that dropout draws the same masks.
- `auto`: as many graphs as memory allows are kept, the other micro-batches are forwarded twice (trainer/memory.py).
- `frozen`: weights are functions that the hook fixed before the step (statistics of earlier steps), so each micro-batch
  goes backward at once with weights that lack only their common divisor; the finished gradient is scaled by it, once,
  before clipping. A step for which the hook has no such function, or asks to be exact, runs as `auto`.

`deferred`, `two_pass` and `auto` give the same gradients.

A model may return, beside its token losses [b, T], features [b, X] of a penalty and statistics [Y] of the micro-batch.
The objective then also has the mean over all rows of features @ c, with c = model.penalty_coefficients(statistics
summed over the step). A model whose c depends on the statistics says `needs_whole_step` and is not run in `streaming`.

One all-gather of a few numbers a sample shows every rank the whole batch (two in `streaming`, which must know the token
counts first). It also carries what ranks have to tell each other (to stop, for one), so agreeing costs nothing.

Shape letters: B samples of the step, b rows of a micro-batch, s samples of a micro-batch, M micro-batches, T sequence,
X features, Y statistics, D domains.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from trainer import ranks
from trainer.data.loader import MicroBatch
from trainer.engine import Engine
from trainer.global_batch import GlobalBatch, Signals, gather_step
from trainer.hooks import FrozenWeights, HookList, Recorder, StepContext
from trainer.host_waits import host_may_wait
from trainer.memory import GraphBudget
from trainer.objective import (
    Normalization,
    Objective,
    SampleSplit,
    coefficient_numerators,
    loss_coefficients,
)
from trainer.phases import PhaseClock

Judge = Callable[[float], tuple[bool, str]]
"""Told the step's finite mean loss: is it a spike, and why must the step be skipped (empty if it must not)."""
AccumulationMode = Literal["streaming", "deferred", "two_pass", "auto", "frozen"]


_NO_SIGNALS = Signals()


class Forwarded(NamedTuple):
    """What one forward gave, by sample."""

    losses_s: Tensor
    """Mean cross-entropy, float64 without a graph, as hooks see it."""
    weighted_s: Tensor
    """What is differentiated, float32: the same, or with token weights sum_t v_t CE_t / n."""
    token_weights_s: Tensor | None
    """Sum of the token weights; None if there are none."""
    features_bX: Tensor | None
    statistics_Y: Tensor | None


@dataclass(frozen=True)
class AccumulatedStep:
    """A step whose gradients are in place, or one that must be skipped."""

    context: StepContext
    coefficients_B: Tensor
    gradient_scale: Tensor | None
    """Factor the gradient still lacks; None if it is complete."""
    skip_reason: str
    """Why there is nothing to apply; empty if there is."""
    loss: float | None
    """Mean cross-entropy over all target tokens; None if it is not finite."""
    is_spike: bool
    signals: Signals
    """Of all ranks together."""


class Accumulator:
    """Runs the micro-batches of one step through the engine."""

    def __init__(
        self,
        engine: Engine,
        hooks: HookList,
        *,
        mode: AccumulationMode,
        normalization: Normalization,
        num_micro_batches: int,
        samples_per_row: int,
        device: torch.device,
        clock: PhaseClock | None = None,
    ) -> None:
        assert mode != "streaming" or not hooks.needs_batch_losses, "a hook needs the losses before the backward"
        assert mode != "streaming" or not getattr(engine.module, "needs_whole_step", False)
        self._engine = engine
        self._hooks = hooks
        self._mode = mode
        self._normalization = normalization
        self._samples_per_row = samples_per_row
        self._device = device
        self._clock = clock or PhaseClock(device)
        self.budget = GraphBudget(mode if mode in ("deferred", "two_pass") else "auto", num_micro_batches, device)

    def run(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        step: int,
        applied_steps: int,
        recorder: Recorder,
        signals: Signals = _NO_SIGNALS,
        judge: Judge = lambda loss: (False, ""),
    ) -> AccumulatedStep:
        """Accumulate the gradient of one step; `signals`: what this rank has to tell."""
        batches = [batch.to(self._device) for batch in micro_batches]
        run = _StepRun(self, batches, step, applied_steps, recorder, signals, judge)
        if self._mode == "streaming":
            return run.streaming()
        frozen = self._hooks.frozen_weights(applied_steps) if self._mode == "frozen" else None
        return run.whole_step() if frozen is None else run.frozen(frozen)


class _StepRun:
    """One step on its way: its micro-batches, and what their forwards gave so far."""

    def __init__(
        self,
        owner: Accumulator,
        batches: Sequence[MicroBatch],
        step: int,
        applied_steps: int,
        recorder: Recorder,
        signals: Signals,
        judge: Judge,
    ) -> None:
        self._engine, self._hooks, self._budget = owner._engine, owner._hooks, owner.budget
        self._normalization, self._device, self._clock = owner._normalization, owner._device, owner._clock
        self._batches = batches
        self._splits = [SampleSplit.of(batch, owner._samples_per_row) for batch in batches]
        self._tokens = [split.tokens() for split in self._splits]
        self._step, self._applied_steps, self._recorder = step, applied_steps, recorder
        self._signals, self._judge = signals, judge
        self._sharing = owner._engine.config.sequence_parallel_size  # ranks that got the same samples
        self._num_rows = sum(len(batch.tokens_bT) for batch in batches) * ranks.world_size() // self._sharing
        self._factors_D = self._hooks.domain_factors()
        self._losses: list[Tensor] = []
        self._token_weights: list[Tensor] = []
        self._statistics: list[Tensor] = []

    def streaming(self) -> AccumulatedStep:
        """Forward and backward each micro-batch in turn, with coefficients that do not depend on losses."""
        known = self._gather(losses=[n.new_zeros(n.shape) for n in self._tokens])
        coefficients_B = self._coefficients(known, None)
        objective = Objective(self._num_rows, self._penalty_coefficients())
        last = len(self._batches) - 1
        for m in range(last):
            forwarded = self._forward(m)
            self._backward(
                objective.share(forwarded.weighted_s, self._own(coefficients_B, m), forwarded.features_bX), last=False
            )
        forwarded = self._forward(last)
        batch = self._gather(losses=self._losses)
        done = self._finish(batch, coefficients_B)
        if done.skip_reason:
            if last > 0:
                self._engine.abandon(forwarded.weighted_s.sum())
            return done
        self._last_backward(
            objective.share(forwarded.weighted_s, self._own(coefficients_B, last), forwarded.features_bX), done.context
        )
        self._record_penalty(objective)
        return done

    def frozen(self, weights: FrozenWeights) -> AccumulatedStep:
        """Forward and backward each micro-batch in turn, with weights that lack their common divisor."""
        objective = Objective(self._num_rows, None)
        numerators: list[Tensor] = []
        last = len(self._batches) - 1
        for m in range(last + 1):
            forwarded = self._forward(m)
            valid_s = self._tokens[m] > 0
            factors_s = self._factor_of(self._splits[m].spread(self._batches[m].domains_b))
            weights_s = weights(forwarded.losses_s, valid_s)
            numerators.append(coefficient_numerators(self._tokens[m], weights_s, self._normalization, factors_s))
            if m < last:  # the last one waits until all losses are known to be finite
                self._backward(objective.share(forwarded.weighted_s, numerators[m], None), last=False)
        batch = self._gather(losses=self._losses, numerators=numerators)
        total = batch.values["numerators"].sum().clamp(min=torch.finfo(torch.float64).tiny)
        used_B = batch.values["numerators"] / total
        done = self._finish(batch, used_B, gradient_scale=1 / (total * self._mean_token_weight(batch)))
        if done.skip_reason:
            if last > 0:
                self._engine.abandon(forwarded.weighted_s.sum())
            return done
        self._last_backward(objective.share(forwarded.weighted_s, numerators[last], None), done.context)
        return done

    def whole_step(self) -> AccumulatedStep:
        """Forward all, let the hooks set weights, then backward all; graphs that were not kept are made again."""
        kept: list[Forwarded] = []
        generators: list[_RandomState] = []
        for m in range(len(self._batches)):
            if m < self._budget.kept:
                self._budget.before_forward()
                kept.append(self._forward(m))
                self._budget.after_forward()
            else:
                generators.append(_RandomState.now(self._device))
                with torch.no_grad():
                    self._forward(m)
        batch = self._gather(losses=self._losses)
        done = self._finish(batch, None)
        if done.skip_reason:
            return done
        objective = Objective(self._num_rows, self._penalty_coefficients())
        coefficients_B = done.coefficients_B / self._mean_token_weight(batch)
        num_kept, last = len(kept), len(self._batches) - 1
        for m in range(last + 1):
            if m < num_kept:
                forwarded = kept.pop(0)
            else:
                generators[m - num_kept].restore(self._device)
                forwarded = self._forward(m)
            share = objective.share(forwarded.weighted_s, self._own(coefficients_B, m), forwarded.features_bX)
            if m < last:
                self._backward(share, last=False)
            else:
                self._last_backward(share, done.context)
        self._record_penalty(objective)
        return done

    def _forward(self, m: int) -> Forwarded:
        """Forward one micro-batch; what the gather needs is noted the first time."""
        with self._clock.phase("losses"):
            return self._sample_losses(m)

    def _sample_losses(self, m: int) -> Forwarded:
        batch, split, tokens_s = self._batches[m], self._splits[m], self._tokens[m]
        with self._clock.phase("forward"):
            output = self._engine.forward(batch.tokens_bT, batch.labels_bT, batch.documents_bT)
        token_losses_bT, features_bX, statistics_Y = (output, None, None) if isinstance(output, Tensor) else output
        token_losses_bT = token_losses_bT.float()
        count_s = tokens_s.clamp(min=1)
        weighted_s = split.sums(token_losses_bT) / count_s
        # In float64: a scale between the least and the largest loss blows up what float32 rounds off a mean.
        losses_s = split.sums(token_losses_bT.detach().double()) / count_s
        weights_bT = self._hooks.token_weights(token_losses_bT.detach())
        token_weights_s = None
        if weights_bT is not None:
            weights_bT = torch.where(split.counted_bT, weights_bT, 0.0)
            weighted_s = split.sums(token_losses_bT * weights_bT) / count_s
            token_weights_s = split.sums(weights_bT)
        if m == len(self._losses):
            self._losses.append(losses_s)
            if token_weights_s is not None:
                self._token_weights.append(token_weights_s)
            if statistics_Y is not None:
                self._statistics.append(statistics_Y)
        return Forwarded(losses_s, weighted_s, token_weights_s, features_bX, statistics_Y)

    def _backward(self, objective: Tensor, *, last: bool) -> None:
        with self._clock.phase("backward"):
            self._engine.backward(objective, last=last)

    def _last_backward(self, objective: Tensor, step: StepContext) -> None:
        """The backward after which gradients are reduced; what hooks have to sum over ranks travels beside it."""
        with self._clock.phase("hooks"):
            self._hooks.before_last_backward(step)
        self._backward(objective, last=True)

    def _gather(self, **values: Sequence[Tensor]) -> GlobalBatch:
        if self._token_weights:
            values["token_weights"] = self._token_weights
        with self._clock.phase("losses"):
            return gather_step(
                self._batches,
                self._splits,
                self._tokens,
                values,
                signals=self._signals,
                sharing=self._sharing,
                busy_s=self._clock.busy_s(),
            )

    def _finish(
        self, batch: GlobalBatch, coefficients_B: Tensor | None, *, gradient_scale: Tensor | None = None
    ) -> AccumulatedStep:
        """Look at the whole step: skip it, or let the hooks see it. `coefficients_B`: None until the hooks set weights.

        The one place of a step where the host waits for the device.
        """
        context = StepContext(
            step=self._step,
            applied_steps=self._applied_steps,
            sample_ids_B=batch.sample_ids_B,
            parts_B=batch.parts_B,
            domains_B=batch.domains_B,
            tokens_B=batch.tokens_B,
            losses_B=batch.values["losses"],
            used_B=None if gradient_scale is None else coefficients_B,
            own_S=self._own_positions(),
            recorder=self._recorder,
        )
        self._recorder.record("data/digest", batch.digest)
        if len(batch.busy_W) > 1:
            self._recorder.record("time/rank_spread", batch.busy_W.max() / batch.busy_W.median().clamp(min=1e-6))
            self._recorder.record("time/slowest_rank", batch.busy_W.argmax())
        finite_B = torch.isfinite(context.losses_B)
        num_tokens = batch.tokens_B.sum()
        mean = (context.losses_B * batch.tokens_B).sum() / num_tokens
        with host_may_wait(self._device):
            seen = torch.stack([finite_B.all().double(), num_tokens.double(), batch.signals.double(), mean]).tolist()
            bad = [] if seen[0] == 1 else batch.sample_ids_B[~finite_B].tolist()
        all_finite, any_tokens, signals = seen[0] == 1, seen[1] > 0, Signals.of(int(seen[2]))
        loss = seen[3] if all_finite and any_tokens else None
        reason = "" if any_tokens else "no sample has a target token"
        is_spike = False
        if not all_finite:
            shown = ", ".join(map(str, bad[:8])) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
            reason = f"loss is not finite in sample {shown}"
        elif loss is not None:
            is_spike, reason = self._judge(loss)
        if not reason:
            with self._clock.phase("hooks"):
                self._hooks.on_losses(context)
        if coefficients_B is None:
            coefficients_B = self._coefficients(batch, context.weights_B)
        context.coefficients_B = coefficients_B
        return AccumulatedStep(context, coefficients_B, gradient_scale, reason, loss, is_spike, signals)

    def _coefficients(self, batch: GlobalBatch, weights_B: Tensor | None) -> Tensor:
        return loss_coefficients(batch.tokens_B, weights_B, self._normalization, self._factor_of(batch.domains_B))

    def _factor_of(self, domains: Tensor) -> Tensor | None:
        return None if self._factors_D is None else self._factors_D[domains]

    def _mean_token_weight(self, batch: GlobalBatch) -> Tensor | float:
        """Mean of the token weights over all target tokens of the step; 1 without token weights."""
        if not self._token_weights:
            return 1.0
        mean = batch.values["token_weights"].sum() / batch.tokens_B.sum()
        self._recorder.record("reweight/token_weight_mean", mean)
        return mean.clamp(min=1e-12)

    def _own(self, values_B: Tensor, m: int) -> Tensor:
        """The part of a global [B] tensor that belongs to micro-batch m, [s]."""
        return values_B[self._positions(m)]

    def _own_positions(self) -> Tensor:
        """Where this rank's samples lie among all, in the order they were forwarded, int64 [S]."""
        return torch.cat([self._positions(m) for m in range(len(self._batches))])

    def _positions(self, m: int) -> Tensor:
        # Rows of a step are consecutive numbers, and the global view is sorted by them: position is a subtraction.
        per_row = self._splits[m].samples_per_row
        rows_b = self._batches[m].sample_ids_b - (self._step - 1) * self._num_rows
        return (rows_b.unsqueeze(1) * per_row + torch.arange(per_row, device=rows_b.device)).flatten()

    def _penalty_coefficients(self) -> Tensor | None:
        module: Any = self._engine.module
        if not hasattr(module, "penalty_coefficients"):
            return None
        total_Y = None
        if module.needs_whole_step:
            total_Y = ranks.all_reduce_(torch.stack(self._statistics).sum(dim=0))
        coefficients_X: Tensor = module.penalty_coefficients(total_Y)
        return coefficients_X

    def _record_penalty(self, objective: Objective) -> None:
        if objective.penalty is not None:
            self._recorder.record(self._engine.module.penalty_name, objective.penalty / self._sharing, "sum")  # type: ignore[arg-type]


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
