"""Dynamic loss-based sample reweighting as a hook (Sow et al., ICLR 2025, arXiv 2502.06733).

It sees the losses of every sample of the optimizer step, over all ranks and micro-batches, before the first backward,
and sets one weight a sample. Under train.accumulation=frozen it fixes the loss scale of a step before it, from the
steps so far, and audits afterwards how far that was from the weights of the step itself.

Shape letters: B samples of the optimizer step, Q bins of the running histogram.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from reweighting.reference import (
    BINS,
    LossRange,
    ReferenceConfig,
    batch_range,
    histogram_range,
    loss_histogram,
)
from reweighting.strategies import find_strategy
from reweighting.temperature import TemperatureConfig, temperature
from reweighting.weighing import divergence, effective_sample_size, sample_scores, sample_weights
from trainer.errors import ConfigError
from trainer.hooks import (
    EvaluationContext,
    FrozenWeights,
    Hook,
    RunContext,
    State,
    StateValue,
    StepContext,
    StepResult,
)
from trainer.host_waits import host_may_wait

_MAX_EXPONENT = 30.0
"""Of frozen weights, up and down: a gradient has their scale until the end of the step, and its norm squares it in
float32. One sample beyond has all the weight, or none, either way; of several the audit tells."""
_FROZEN_DECAY = 0.9  # of the ends of the loss scale that frozen steps use: losses drift slowly, batches are noisy


@dataclass(frozen=True, kw_only=True)
class FrozenConfig:
    """What to do with weights that are fixed before the step (train.accumulation=frozen)."""

    tolerance: float = 0.05
    """Divergence KL(true || used), in nats, above which the following steps are exact."""
    exact_steps: int = 10
    """How many steps those are."""

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        found = []
        if not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            found.append(f"tolerance: {self.tolerance} must be finite and not negative")
        if self.exact_steps < 1:
            found.append(f"exact_steps: {self.exact_steps} must be at least 1")
        return found


@dataclass(frozen=True, kw_only=True)
class SampleReweightConfig:
    """Which samples get more weight, and how sharply."""

    strategy: str = "linupper"
    """Score of a loss: linupper, quadratic, extremes, uniform, linear, or your own as package.module:function."""
    alpha: float = 1.0
    """Half-width of the normalised losses."""
    temperature: TemperatureConfig = field(default_factory=TemperatureConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    weigh: Literal["rows", "documents"] = "rows"
    """What gets one weight: a row of tokens (the paper), or each document's part of a row."""
    cap: float = 0.0
    """No weight above cap / samples; at least 1, 0 sets no limit. The paper's bounds assume 2."""
    ess_floor: float = 0.0
    """The temperature is raised until the effective sample size is this share of the samples; 0 never raises it."""
    frozen: FrozenConfig = field(default_factory=FrozenConfig)
    record_every: int = 50
    """Applied steps between records of all losses and weights (histograms, launch.reweight_lab); 0 records none."""
    show_documents: int = 5
    """Most and least weighted samples whose text's beginning is recorded at an evaluation; 0 shows none."""

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        found = []
        for name in ("temperature", "reference", "frozen"):
            found += [f"{name}.{line}" for line in getattr(self, name).problems()]
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            found.append(f"alpha: {self.alpha} must be finite and positive")
        try:
            strategy = find_strategy(self.strategy)
        except ConfigError as error:
            found.append(f"strategy: {error}")
        else:
            if not strategy.depends_on_alpha and self.alpha != SampleReweightConfig().alpha:
                found.append(f"alpha: strategy {self.strategy} does not depend on it; remove it")
            if not strategy.normalized and self.reference != ReferenceConfig():
                found.append(f"reference: strategy {self.strategy} weighs raw losses; remove it")
        if self.cap and not (math.isfinite(self.cap) and self.cap >= 1):
            found.append(f"cap: {self.cap} must be at least 1, or 0 for no limit")
        if not 0 <= self.ess_floor < 1:
            found.append(f"ess_floor: {self.ess_floor} must be in [0, 1)")
        for name in ("record_every", "show_documents"):
            if getattr(self, name) < 0:
                found.append(f"{name}: {getattr(self, name)} is negative; use 0 for none")
        return found


class SampleReweightHook(Hook):
    """Owns the sample weights of a step."""

    Config = SampleReweightConfig
    owns = frozenset({"weights"})
    needs_batch_losses = True
    version = 2

    def __init__(self, config: SampleReweightConfig) -> None:
        self._config = config
        self._strategy = find_strategy(config.strategy)
        grid_Q = torch.linspace(-config.alpha, config.alpha, 65, dtype=torch.float64)
        self._highest_score = float(self._strategy.score(grid_Q, config.alpha).max())  # if it is of normalised losses
        self.weighs = config.weigh
        self.frozen_problem = (
            "hooks.sample_reweight.cap and ess_floor need all losses of the step; remove them"
            if config.cap or config.ess_floor
            else ""
        )
        self.exact_problem = (
            "hooks.sample_reweight.frozen: is read only with train.accumulation frozen; remove it"
            if config.frozen != FrozenConfig()
            else ""
        )
        self._run: RunContext
        self._histogram_Q = torch.zeros(BINS, dtype=torch.float64)
        self._window_steps = 0
        """Applied steps that are in the histogram of `running` statistics."""
        self._low = self._high = torch.zeros((), dtype=torch.float64)
        self._frozen_steps = 0
        """Applied steps that are in the ends of the loss scale of frozen steps."""
        self._exact_until = 0
        self._last: StepContext | None = None
        self._last_weights_B = torch.empty(0)

    def on_start(self, run: RunContext) -> None:
        """Put the statistics on the run's device."""
        self._run = run
        self._histogram_Q = self._histogram_Q.to(run.device)
        self._low, self._high = self._low.to(run.device), self._high.to(run.device)

    def on_losses(self, step: StepContext) -> None:
        """Set the weights of the whole step; after a frozen one, compare them with those that were used."""
        config = self._config
        r = self._temperature(step.applied_steps)
        ends = self._ends(step.losses_B, step.valid_B)
        weights_B = sample_weights(
            step.losses_B, step.valid_B, self._strategy,
            alpha=config.alpha, temperature=r, ends=ends, cap=config.cap, ess_floor=config.ess_floor,
        )  # fmt: skip
        step.weights_B = weights_B
        if step.used_B is not None:
            audit = divergence(weights_B.double(), self._used_weights(step))
            step.record("reweight/audit_kl", audit)
            with host_may_wait(audit.device):  # a short one: the step's verdict has just drained the device's queue
                is_off = float(audit) > config.frozen.tolerance
            if is_off:
                self._exact_until = step.applied_steps + 1 + config.frozen.exact_steps
        num_valid = step.valid_B.sum()
        step.record("reweight/ess", effective_sample_size(weights_B) / num_valid)
        step.record("reweight/max_weight", weights_B.max() * num_valid)
        step.record("reweight/temperature", r)
        if self._run.is_frozen:
            step.record("reweight/frozen", int(step.used_B is not None))
        if config.record_every and step.applied_steps % config.record_every == 0:
            _record_samples(step, weights_B)
        self._last, self._last_weights_B = step, weights_B

    def after_step(self, step: StepContext, result: StepResult) -> None:
        """Take the losses of an applied step into the running statistics; a skipped one leaves no trace."""
        if not result.applied:
            return
        if self._config.reference.kind == "running":
            seen_Q = loss_histogram(step.losses_B, step.valid_B)
            self._histogram_Q = self._config.reference.decay * self._histogram_Q + seen_Q
            self._window_steps += 1
        elif self._run.is_frozen:
            ends = self._ends(step.losses_B, step.valid_B)
            decay = _FROZEN_DECAY if self._frozen_steps else 0.0
            self._low = torch.lerp(ends.low.double(), self._low, decay)
            self._high = torch.lerp(ends.high.double(), self._high, decay)
            self._frozen_steps += 1

    def frozen_weights(self, applied_steps: int) -> FrozenWeights | None:
        """exp((score - highest score) / r) with the loss scale of the steps so far; None until there were any."""
        config, strategy, r = self._config, self._strategy, self._temperature(applied_steps)
        is_running = config.reference.kind == "running"
        known_steps = self._window_steps if is_running else self._frozen_steps
        if not known_steps or applied_steps < self._exact_until:
            return None
        if is_running:
            ends = histogram_range(self._histogram_Q, config.reference.quantile)
        else:
            ends = LossRange(self._low, self._high)
        # Any constant will do that keeps exponents small. Without a spread all scores of normalised losses are 0.
        highest = torch.where(ends.is_spread, self._highest_score, 0.0) if strategy.normalized else ends.high

        def weigh(losses_s: Tensor, valid_s: Tensor) -> Tensor:
            scores_s = sample_scores(losses_s, valid_s, strategy, config.alpha, ends)
            exponents_s = ((scores_s - highest) / r).clamp(-_MAX_EXPONENT, _MAX_EXPONENT)
            return torch.where(valid_s, exponents_s.exp(), 0.0)

        return weigh

    def on_evaluate(self, evaluation: EvaluationContext) -> None:
        """Show the most and the least weighted samples of the last step."""
        count = self._config.show_documents
        if count and self._last is not None:
            evaluation.record("reweight/documents", self._documents(self._last, self._last_weights_B, count))

    def state_dict(self) -> State:
        """Running statistics, and until when steps are exact."""
        return {
            "histogram": self._histogram_Q.clone(),
            "window_steps": self._window_steps,
            "low": self._low.clone(),
            "high": self._high.clone(),
            "frozen_steps": self._frozen_steps,
            "exact_until": self._exact_until,
        }

    def load_state_dict(self, state: Mapping[str, StateValue]) -> None:
        """Take back what `state_dict` gave."""
        device = self._histogram_Q.device
        self._histogram_Q, self._low, self._high = (
            torch.as_tensor(state[key]).to(device) for key in ("histogram", "low", "high")
        )
        self._window_steps, self._frozen_steps, self._exact_until = (
            int(state[key]) for key in ("window_steps", "frozen_steps", "exact_until")
        )

    def _temperature(self, applied_steps: int) -> float:
        return temperature(self._config.temperature, applied_steps, self._run.total_steps)

    def _ends(self, losses_B: Tensor, valid_B: Tensor) -> LossRange:
        """The loss scale of an exact step: of the step itself, or of the window before it, if there is one yet."""
        reference = self._config.reference
        own = batch_range(losses_B, valid_B, 0.0 if reference.kind == "minmax" else reference.quantile)
        if reference.kind != "running":
            return own
        past = histogram_range(self._histogram_Q, reference.quantile)
        return LossRange(
            torch.where(past.low.isnan(), own.low, past.low), torch.where(past.high.isnan(), own.high, past.high)
        )

    def _used_weights(self, step: StepContext) -> Tensor:
        """The sample weights of a frozen step: its numerators, without lengths and domain factors, over their sum."""
        assert step.used_B is not None
        weigh = self.frozen_weights(step.applied_steps)
        assert weigh is not None
        weights_B = weigh(step.losses_B, step.valid_B).double()
        return weights_B / weights_B.sum().clamp(min=1e-300)

    def _documents(self, step: StepContext, weights_B: Tensor, count: int) -> list[dict[str, Any]]:
        by_weight_B = torch.where(step.valid_B, weights_B, -1.0).argsort(descending=True, stable=True)
        order: list[int] = by_weight_B[step.valid_B[by_weight_B]].tolist()
        chosen = order[:count] + order[max(count, len(order) - count) :]
        columns = [
            column[chosen].tolist()
            for column in (step.sample_ids_B, step.parts_B, step.domains_B, step.losses_B, weights_B)
        ]
        num_valid = len(order)
        parts = columns[1] if self.weighs == "documents" else [None] * len(chosen)
        texts = self._run.excerpts(list(zip(columns[0], parts, strict=True)))
        return [
            {
                "sample": sample,
                "part": part,
                "domain": self._run.domain_names[domain],
                "loss": loss,
                "weight": weight * num_valid,
                "text": text,
            }
            for sample, part, domain, loss, weight, text in zip(*columns, texts, strict=True)
        ]


def _record_samples(step: StepContext, weights_B: Tensor) -> None:
    """Every sample of the step as vectors: what histograms are drawn from, and what other strategies can replay."""
    step.record("reweight/samples/id", step.sample_ids_B)
    step.record("reweight/samples/domain", step.domains_B)
    step.record("reweight/samples/tokens", step.tokens_B)
    step.record("reweight/samples/loss", step.losses_B)
    step.record("reweight/samples/weight", weights_B * step.valid_B.sum())
