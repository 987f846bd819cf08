"""Auxiliary-loss-free balancing as a hook: after each applied step the selection bias follows the loads.

Decisions:
- Loads are of the whole optimizer step: all micro-batches, all ranks, one all-reduce for all layers. It starts when the
  last forward is over and travels while the last backward computes.
- A skipped step moves nothing and its loads are thrown away.
- The bias is float32, lives in the routers, and is saved by this hook too: engines cast or drop buffers.
- Every evaluation ends with a certificate that all this is so (moe/certificate.py).
- A model without MoE layers is an error: balancing that silently does nothing is the mistake to avoid.

Shape letters: E experts, Q threshold bins, L MoE layers.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from moe.balance_metrics import dead_experts, load_entropy, max_violation
from moe.certificate import BalanceCertificate
from moe.heldout_balance import DomainLoads, duality_gaps, layer_matrix, relative_loads
from moe.router import RoutingStats
from moe.rules import RULES, Loads, Rule, RuleOptions, apply_rule, multiplies
from moe.score_sample import ScoreSample
from trainer import ranks
from trainer.errors import ConfigError
from trainer.hooks import EvaluationContext, Hook, RunContext, State, StateValue, StepContext, StepResult

RuleName = Literal[
    "sign", "centered_sign", "proportional", "rms", "decay_sqrt", "decay_linear", "smebu", "pid", "multiplicative",
    "quantile", "bip", "none",
]  # fmt: skip


log = logging.getLogger("evenkeel")

_STARVED = 0.5  # an expert is starved if its tokens have less than half the weight of as many average ones


@dataclass(frozen=True, kw_only=True)
class RateSchedule:
    """How the size of a step changes over the run, by applied steps."""

    shape: Literal["constant", "cosine"] = "constant"
    """cosine falls to zero over the run."""
    zero_last: float = 0.0
    """Share of the run, at its end, in which the bias stays as it is (DeepSeek-V3: .5 of 14.8 T tokens)."""
    freeze_after: int = 0
    """Applied steps after which the bias stays where it is; 0 never freezes it."""

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        found = []
        if not 0 <= self.zero_last < 1:
            found.append(f"zero_last: {self.zero_last} must be in [0, 1)")
        if self.freeze_after < 0:
            found.append(f"freeze_after: {self.freeze_after} is negative; use 0 to never freeze")
        return found


def rate_factor(schedule: RateSchedule, applied_steps: int, total_steps: int) -> float:
    """Factor on the rate of the update that follows `applied_steps` applied ones; 0 where the bias is frozen."""
    if schedule.freeze_after and applied_steps >= schedule.freeze_after:
        return 0.0
    if schedule.zero_last and applied_steps >= round((1 - schedule.zero_last) * total_steps):
        return 0.0
    if schedule.shape == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(applied_steps / max(total_steps, 1), 1.0)))
    return 1.0


@dataclass(frozen=True, kw_only=True)
class ExpertBiasConfig:
    """How the bias moves."""

    rule: RuleName = "sign"
    """Balancing rule of moe/rules.py; `none` measures loads and moves nothing, the baseline of an ablation."""
    rate: float = 1e-3
    """Size of a step (u); `quantile` and `bip` have none, and say so in the log if one is set."""
    schedule: RateSchedule = field(default_factory=RateSchedule)
    options: RuleOptions = field(default_factory=RuleOptions)
    clamp: float = 0.0
    """Largest absolute bias; 0 sets no limit."""
    count: Literal["tokens", "weight"] = "tokens"
    """What a load is: tokens, or the weight that samples give them (needs a hook that sets sample weights)."""
    gap_tokens: int = 256
    """Held-out tokens from which an evaluation measures the duality gap; 0 does not measure it."""

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        found = [f"schedule.{line}" for line in self.schedule.problems()]
        if not (math.isfinite(self.rate) and self.rate >= 0):
            found.append(f"rate: {self.rate} must be finite and not negative")
        if not (math.isfinite(self.clamp) and self.clamp >= 0):
            found.append(f"clamp: {self.clamp} must be finite and not negative; 0 sets no limit")
        if self.count == "weight" and self.rule in ("quantile", "bip", "none"):
            found.append(f"count: rule {self.rule} does not move by loads; remove it")
        if self.gap_tokens < 0:
            found.append(f"gap_tokens: {self.gap_tokens} is negative; 0 does not measure the gap")
        rule = RULES.get(self.rule)
        if self.clamp and rule is not None and rule.multiplicative:
            found.append("clamp: a multiplicative bias starts at 1 and is not clamped; remove it")
        if rule is not None and rule.needs_thresholds and self.schedule.shape != "constant":
            found.append(f"schedule.shape: {self.rule} has no rate to schedule; remove it")
        read = rule.options if rule is not None else ()
        defaults = asdict(RuleOptions())
        for name, value in asdict(self.options).items():
            if not math.isfinite(value) or value < 0:
                found.append(f"options.{name}: {value} must be finite and not negative")
            elif value != defaults[name] and name not in read:
                found.append(f"options.{name}: rule {self.rule} does not read it; remove it")
        for name in ("beta", "ema"):
            if getattr(self.options, name) >= 1:
                found.append(f"options.{name}: {getattr(self.options, name)} must be less than 1")
        return found


class BalancedRouter(Protocol):
    """What the hook needs of a router."""

    expert_bias_E: Tensor
    num_experts: int
    top_k: int

    def prepare_balancing(self, *, multiplicative: bool, collect_thresholds: bool, least_alpha: float) -> None: ...

    def threshold_range(self) -> tuple[Tensor, Tensor]: ...

    @property
    def selects_by_price(self) -> bool: ...


class _BalancedLayer(Protocol):
    router: BalancedRouter


class _BalancedModel(Protocol):
    def moe_layers(self) -> Sequence[_BalancedLayer]: ...

    def take_loads(self, kind: Literal["train", "eval"]) -> list[RoutingStats]: ...

    def take_counts(self, kind: Literal["train", "eval"]) -> list[Tensor]: ...

    def count_by_sample(self, samples_per_row: int) -> None: ...


class ExpertBiasHook(Hook):
    """Moves every router's bias by one rule and reports how balanced the experts are."""

    Config = ExpertBiasConfig

    def __init__(self, config: ExpertBiasConfig) -> None:
        self._config = config
        self._rule = RULES.get(config.rule)
        self.owns = frozenset() if self._rule is None else frozenset({"expert_bias"})
        self.needs = frozenset({"weights"}) if config.count == "weight" else frozenset()
        self._has_weights = False
        self._summed: Callable[[], _Sums] | None = None  # the loads on their way between ranks
        self._updates = 0
        self._states: list[dict[str, Tensor]] = []
        self._total_steps = 0
        self._certificate: BalanceCertificate | None = None
        self._domain_loads = DomainLoads(1)
        self._sample: ScoreSample | None = None
        self._model: _BalancedModel
        self._routers: list[BalancedRouter] = []

    def on_start(self, run: RunContext) -> None:
        """Find the routers in the model and prepare them for the rule.

        Raises ConfigError if there is none.
        """
        self._model = cast(_BalancedModel, run.model)
        if not hasattr(run.model, "moe_layers") or not self._model.moe_layers():
            raise ConfigError(f"expert bias: {type(run.model).__name__} has no MoE layer to balance; disable the hook")
        self._routers = [layer.router for layer in self._model.moe_layers()]
        # Not refused: presets bring a rate, and naming another rule on the command line should be enough.
        has_rate = self._rule is None or not self._rule.needs_thresholds
        if not has_rate and self._config.rate != ExpertBiasConfig.rate and ranks.is_main():
            log.warning("expert bias: rule %s has no rate; %g is not read", self._config.rule, self._config.rate)
        self._total_steps = run.total_steps
        self._has_weights = run.has_weights
        if run.has_weights:
            self._model.count_by_sample(run.samples_per_row)
        self._domain_loads = DomainLoads(len(run.domain_names))
        if self._rule is not None:
            self._prepare(self._rule, run.model)
        # Where selection is not the TopK of score + bias, biases are no prices and there is no gap to speak of.
        if self._config.gap_tokens and all(router.selects_by_price for router in self._routers):
            self._sample = ScoreSample(
                run.model, [cast(nn.Module, router) for router in self._routers], self._config.gap_tokens
            )

    def _prepare(self, rule: Rule, model: nn.Module) -> None:
        for router in self._routers:
            router.prepare_balancing(
                multiplicative=rule.multiplicative,
                collect_thresholds=rule.needs_thresholds,
                least_alpha=rule.least_alpha,
            )
            self._states.append({name: torch.zeros_like(router.expert_bias_E) for name in rule.state})
        self._certificate = BalanceCertificate(
            model, [router.expert_bias_E for router in self._routers], [router.top_k for router in self._routers]
        )

    def before_last_backward(self, step: StepContext) -> None:
        """Send the loads of the step on their way."""
        self._start_sum(step, weighed=self._has_weights)

    def after_step(self, step: StepContext, result: StepResult) -> None:
        """Take the loads of the step, and move the biases if the optimizer moved."""
        if self._summed is None:  # skipped before the last backward, or a loop that does not announce it
            self._start_sum(step, weighed=result.applied and self._has_weights)
        assert self._summed is not None
        (loads, masses), self._summed = self._summed(), None
        if self._certificate is not None:
            self._certificate.before_move()
        if result.applied:
            by = masses if self._config.count == "weight" else [layer.counts_E for layer in loads]
            self._move(loads, by, rate_factor(self._config.schedule, step.applied_steps, self._total_steps))
        if self._certificate is not None:
            self._certificate.after_move()
            if result.applied:  # a skipped step may not have forwarded with gradients at all
                counts = [layer.counts_E for layer in loads]
                self._certificate.observe_loads(counts, step.tokens_B.sum())
        self._record(step, loads)
        if masses and result.applied:
            _record_masses(step, [layer.counts_E for layer in loads], masses)

    def _start_sum(self, step: StepContext, *, weighed: bool) -> None:
        own = self._model.take_loads("train")
        self._summed = _start_sum_over_ranks(own, _masses(own, step) if weighed else [])

    def on_evaluate_domain(self, domain: int) -> None:
        """Put the domain's held-out loads aside."""
        self._domain_loads.add(domain, self._model.take_counts("eval"))

    def on_evaluate(self, evaluation: EvaluationContext) -> None:
        """Record MaxVio_global (averaged over layers), held-out loads, biases, the duality gap and the certificate."""
        loads = self._domain_loads.take(self._model.take_counts("eval"))
        counts = [loads_DE.sum(dim=0) for loads_DE in loads]
        biases = [router.expert_bias_E.clone() for router in self._routers]
        violations = torch.stack([max_violation(counts_E) for counts_E in counts])
        evaluation.record("eval/maxvio_global", violations.nanmean())  # layers that only train have no loads here
        evaluation.record("moe/loads", layer_matrix([relative_loads(counts_E) for counts_E in counts]))
        evaluation.record("moe/bias", layer_matrix(biases))
        for i in range(len(counts)):
            evaluation.record(f"moe/layer{i}/loads", counts[i])
            evaluation.record(f"moe/layer{i}/domain_loads", loads[i])
            evaluation.record(f"moe/layer{i}/bias", biases[i])
        if self._sample is not None:
            gaps_L = duality_gaps(self._sample.take(), biases, [router.top_k for router in self._routers])
            for i, gap in enumerate(gaps_L):
                evaluation.record(f"moe/layer{i}/duality_gap", gap)
            evaluation.record("moe/duality_gap", gaps_L.nanmean())
        if self._certificate is not None:
            self._certificate.verify(evaluation.step)
            evaluation.record("moe/certificate", 1)

    def state_dict(self) -> State:
        """Each layer's bias and the rule's own tensors, the number of updates, and the rule they belong to."""
        state: State = {f"bias.{i}": router.expert_bias_E.clone() for i, router in enumerate(self._routers)}
        for i, own in enumerate(self._states):
            state |= {f"{name}.{i}": tensor.clone() for name, tensor in own.items()}
        return state | {"updates": self._updates, "rule": self._config.rule}

    def load_state_dict(self, state: Mapping[str, StateValue]) -> None:
        """Put saved biases into the routers. Of another rule only the biases are taken over.

        Raises ConfigError if one rule is multiplicative and the other is not (`none` is not): biases do not translate.
        """
        if multiplies(state["rule"]) != multiplies(self._config.rule):
            raise ConfigError(
                f"expert bias: the checkpoint was balanced by {state['rule']}, not {self._config.rule}: one multiplies "
                "scores by biases, the other adds them; keep the rule (with rate 0 nothing moves) or set a new run_dir"
            )
        for i, router in enumerate(self._routers):
            router.expert_bias_E.copy_(cast(Tensor, state[f"bias.{i}"]))
        if self._certificate is not None:
            self._certificate.after_move()
        if state["rule"] == self._config.rule:
            self._updates = int(cast(int, state["updates"]))
            for i, own in enumerate(self._states):
                for name, tensor in own.items():
                    tensor.copy_(cast(Tensor, state.get(f"{name}.{i}", torch.zeros_like(tensor))))  # older: fewer

    @torch.no_grad()
    def _move(self, loads: Sequence[RoutingStats], by: Sequence[Tensor], factor: float) -> None:
        """Move every layer's bias; `by`: the loads that are to be evened out, [E] for each layer."""
        if self._rule is None or factor == 0.0:
            return
        self._updates += 1
        for i, (router, layer, load_E) in enumerate(zip(self._routers, loads, by, strict=True)):
            low, high = router.threshold_range()
            bias_E, state = apply_rule(
                self._rule,
                Loads(load_E, layer.thresholds_EQ, low, high, router.top_k / router.num_experts),
                router.expert_bias_E,
                self._states[i],
                n=self._updates,
                rate=self._config.rate * factor,
                options=self._config.options,
            )
            limit = self._config.clamp
            router.expert_bias_E.copy_(bias_E.clamp(-limit, limit) if limit else bias_E)
            self._states[i] |= state

    def _record(self, step: StepContext, loads: Sequence[RoutingStats]) -> None:
        counts = [layer.counts_E for layer in loads]
        violations = [max_violation(counts_E) for counts_E in counts]
        for i, violation in enumerate(violations):
            step.record(f"moe/layer{i}/maxvio", violation)
        step.record("moe/maxvio_batch", _mean(violations))
        step.record("moe/load_entropy", _mean([load_entropy(counts_E) for counts_E in counts]))
        step.record("moe/dead_experts", torch.stack([dead_experts(counts_E) for counts_E in counts]).sum())
        dropped = torch.stack([layer.dropped for layer in loads]).sum()
        step.record("moe/dropped_share", dropped / torch.cat(counts).sum().clamp(min=1))
        biases = torch.cat([router.expert_bias_E for router in self._routers])
        step.record("moe/bias_absmax", biases.abs().max())
        step.record("moe/bias_mean", biases.mean())


class _Sums(NamedTuple):
    """Loads and weight masses of all layers over all ranks."""

    loads: list[RoutingStats]
    masses: list[Tensor]


def _start_sum_over_ranks(loads: Sequence[RoutingStats], masses: Sequence[Tensor]) -> Callable[[], _Sums]:
    """Begin to sum loads and weight masses of all layers over ranks, in one collective; the result waits for it.

    Layers may have different numbers of experts. Counts of single samples stay on their rank and are left out.
    """
    additive = [layer._replace(by_sample_SE=None) for layer in loads]
    tensors = [tensor for layer in additive for tensor in layer if tensor is not None]
    # Beside masses the counts ride in float64, which holds them exactly up to 2^53.
    finish = ranks.start_all_reduce_(torch.cat([tensor.flatten() for tensor in (*tensors, *masses)]))

    def sums() -> _Sums:
        parts = iter(finish().split([tensor.numel() for tensor in (*tensors, *masses)]))

        def next_like(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else next(parts).view_as(tensor).to(tensor.dtype)

        summed = [RoutingStats(*(next_like(tensor) for tensor in layer)) for layer in additive]  # type: ignore[arg-type]
        return _Sums(summed, list(parts))

    return sums


def _masses(loads: Sequence[RoutingStats], step: StepContext) -> list[Tensor]:
    """This rank's part of each expert's load when tokens count by their weight in the objective, float64 [E] a layer.

    A token of sample i counts N c_i / n_i, with N the target tokens of the step: 1 if all tokens weigh the same.
    """
    assert step.coefficients_B is not None
    tokens_B = step.tokens_B.double()
    per_token_B = tokens_B.sum() * step.coefficients_B / tokens_B.clamp(min=1)
    per_token_S = per_token_B[step.own_S]
    return [per_token_S @ layer.by_sample_SE.double() for layer in loads if layer.by_sample_SE is not None]


def _record_masses(step: StepContext, counts: Sequence[Tensor], masses: Sequence[Tensor]) -> None:
    """How even weight is over experts, and how many get much less of it than of tokens."""
    violations = [max_violation(mass_E) for mass_E in masses]
    for i, violation in enumerate(violations):
        step.record(f"moe/layer{i}/maxvio_weighted", violation)
    step.record("moe/maxvio_weighted", _mean(violations))
    starved = [(mass_E < _STARVED * counts_E).sum() for counts_E, mass_E in zip(counts, masses, strict=True)]
    step.record("moe/starved_experts", torch.stack(starved).sum())


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()
