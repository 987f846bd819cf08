"""Auxiliary-loss-free balancing as a hook: after each applied step the selection bias follows the loads.

Decisions:
- Loads are of the whole optimizer step: all micro-batches, all ranks, one all-reduce for all layers.
- A skipped step moves nothing and its loads are thrown away.
- The bias is float32, lives in the routers, and is saved by this hook too: engines cast or drop buffers.
- A model without MoE layers is an error: balancing that silently does nothing is the mistake to avoid.

Shape letters: E experts, L MoE layers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from moe.balance_metrics import dead_experts, load_entropy, max_violation
from moe.rules import RULES
from trainer import ranks
from trainer.errors import ConfigError
from trainer.hooks import EvaluationContext, Hook, RunContext, State, StateValue, StepContext, StepResult


@dataclass(frozen=True, kw_only=True)
class ExpertBiasConfig:
    """How the bias moves."""

    rule: Literal["sign", "centered_sign", "none"] = "sign"
    """Balancing rule; `none` measures loads and moves nothing, the baseline of an ablation."""
    rate: float = 1e-3
    """Size of a step (u)."""
    clamp: float = 0.0
    """Largest absolute bias; 0 sets no limit."""

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        found = []
        if not (math.isfinite(self.rate) and self.rate >= 0):
            found.append(f"rate: {self.rate} must be finite and not negative")
        if not (math.isfinite(self.clamp) and self.clamp >= 0):
            found.append(f"clamp: {self.clamp} must be finite and not negative; 0 sets no limit")
        return found


class _Router(Protocol):
    expert_bias_E: Tensor


class _BalancedLayer(Protocol):
    router: _Router


class _BalancedModel(Protocol):
    def moe_layers(self) -> Sequence[_BalancedLayer]: ...

    def take_counts(self, kind: Literal["train", "eval"]) -> list[Tensor]: ...


class ExpertBiasHook(Hook):
    """Moves every router's bias by one rule and reports how balanced the experts are."""

    Config = ExpertBiasConfig

    def __init__(self, config: ExpertBiasConfig) -> None:
        self._config = config
        self.owns = frozenset() if config.rule == "none" else frozenset({"expert_bias"})
        self._updates = 0
        self._model: _BalancedModel
        self._routers: list[_Router] = []

    def on_start(self, run: RunContext) -> None:
        """Find the routers in the model.

        Raises ConfigError if there is none.
        """
        self._model = cast(_BalancedModel, run.model)
        if not hasattr(run.model, "moe_layers") or not self._model.moe_layers():
            raise ConfigError(f"expert bias: {type(run.model).__name__} has no MoE layer to balance; disable the hook")
        self._routers = [layer.router for layer in self._model.moe_layers()]

    def after_step(self, step: StepContext, result: StepResult) -> None:
        """Take the loads of the step, and move the biases if the optimizer moved."""
        counts = _sum_over_ranks(self._model.take_counts("train"))
        if result.applied and self._config.rule != "none":
            self._move(counts)
        self._record(step, counts)

    def on_evaluate(self, evaluation: EvaluationContext) -> None:
        """Record MaxVio_global: loads over the whole held-out split, averaged over layers."""
        counts = _sum_over_ranks(self._model.take_counts("eval"))
        evaluation.record("eval/maxvio_global", _mean([max_violation(counts_E) for counts_E in counts]))

    def state_dict(self) -> State:
        """The bias of each layer and the number of updates."""
        biases: State = {f"bias.{i}": router.expert_bias_E.clone() for i, router in enumerate(self._routers)}
        return biases | {"updates": self._updates}

    def load_state_dict(self, state: Mapping[str, StateValue]) -> None:
        """Put saved biases into the routers."""
        for i, router in enumerate(self._routers):
            saved = state[f"bias.{i}"]
            assert isinstance(saved, Tensor)
            router.expert_bias_E.copy_(saved)
        self._updates = int(cast(int, state["updates"]))

    @torch.no_grad()
    def _move(self, counts: Sequence[Tensor]) -> None:
        rule, limit = RULES[self._config.rule], self._config.clamp
        self._updates += 1
        for router, counts_E in zip(self._routers, counts, strict=True):
            bias_E = rule(counts_E, router.expert_bias_E, self._config.rate)
            router.expert_bias_E.copy_(bias_E.clamp(-limit, limit) if limit else bias_E)

    def _record(self, step: StepContext, counts: Sequence[Tensor]) -> None:
        violations = [max_violation(counts_E) for counts_E in counts]
        for i, violation in enumerate(violations):
            step.record(f"moe/layer{i}/maxvio", violation)
        step.record("moe/maxvio_batch", _mean(violations))
        step.record("moe/load_entropy", _mean([load_entropy(counts_E) for counts_E in counts]))
        step.record("moe/dead_experts", torch.stack([dead_experts(counts_E) for counts_E in counts]).sum())
        biases = torch.cat([router.expert_bias_E for router in self._routers])
        step.record("moe/bias_absmax", biases.abs().max())
        step.record("moe/bias_mean", biases.mean())


def _sum_over_ranks(counts: Sequence[Tensor]) -> list[Tensor]:
    """Loads of every layer summed over ranks, in one collective. Layers may have different numbers of experts."""
    flat = ranks.all_reduce_(torch.cat(list(counts)))
    return list(flat.split([counts_E.numel() for counts_E in counts]))


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()
