"""Auxiliary-loss-free balancing in anybody's training loop: three lines around a model of transformers, or your own.

    balancer = BiasBalancer(model, rule="sign", rate=1e-3)   # before deepspeed.initialize, DDP, ...
    ...forward and backward of all micro-batches, optimizer step...
    balancer.step(applied=True)                              # False if the optimizer skipped the step

Decisions (each is a mistake that public implementations made):
- What counts is a forward of `model` in training mode with gradients: no evaluation, no generation, no first pass that
  only looks at losses; and no recomputation, which runs inside the backward.
- Padding, by the model's `attention_mask`, is not counted.
- Loads are of the whole optimizer step: all micro-batches, all ranks of the default group, one all-reduce a step.
- A skipped step moves nothing and its loads are thrown away.
- The bias is a float32 buffer whatever the model is cast to (moe/foreign_routers.py).

Shape letters: E experts, N tokens, K experts a token uses, Q threshold bins.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from moe.balance_metrics import max_violation
from moe.bias_hook import ExpertBiasConfig, RuleName
from moe.foreign_routers import ForeignRouter, find_routers, keep_exact
from moe.foreign_scores import find_scores, logits_of
from moe.router import THRESHOLD_BINS, count_tokens, threshold_histogram
from moe.rules import RULES, Loads, RuleOptions, apply_rule
from trainer import ranks
from trainer.errors import ConfigError
from trainer.hooks import State, StateValue


class StepLoads(NamedTuple):
    """What the experts did in one optimizer step, over all ranks. Nothing here has waited for the device."""

    max_violation: Tensor
    """MaxVio, (busiest - mean) / mean, averaged over layers: float64 scalar, NaN if no token was counted."""
    counts: dict[str, Tensor]
    """Tokens that chose each expert, int64 [E], by the router's name."""


@dataclass
class _Layer:
    """A router and what was counted since the last step."""

    router: ForeignRouter
    state: dict[str, Tensor]
    counts_E: Tensor
    thresholds_EQ: Tensor | None
    scores: Callable[[Tensor], Tensor] | None = None
    top_k: int = 0


class BiasBalancer:
    """Counts what the routers of `model` select, and moves their biases after each step.

    `rule`: a rule of moe/rules.py, or `none` to measure only. `rate`: the size of its step, which may be changed at
    any time (0 freezes the bias). `clamp`: largest absolute bias, 0 sets no limit. `options`: constants of the rule,
    such as `kappa=2.0`. `routers`: for models whose routers are not found by themselves.

    Raises ConfigError if the model has no such router, or for a rule that cannot work with it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rule: RuleName = "sign",
        rate: float = 1e-3,
        clamp: float = 0.0,
        routers: Sequence[ForeignRouter] | None = None,
        **options: float,
    ) -> None:
        self.rule_name, self.rate, self._clamp = rule, rate, clamp
        self._rule = _checked(rule, rate, clamp, options)
        self._options = RuleOptions(**options)
        self._updates = 0
        self._observed = False
        self._counting: bool | None = None
        self._mask: Tensor | None = None
        routers = find_routers(model) if routers is None else routers
        for router in routers:
            keep_exact(router)
        self._layers = [self._new_layer(router) for router in routers]
        self._handles = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
            # Before hooks that free the router's weights (ZeRO-3), which finding the score function needs once.
            *(
                layer.router.module.register_forward_hook(self._observer(layer), prepend=True, with_kwargs=True)
                for layer in self._layers
            ),
        ]

    @property
    def biases(self) -> dict[str, Tensor]:
        """Each router's bias, float32 [E], by its name: views, not copies."""
        return {layer.router.name: layer.router.bias_E for layer in self._layers}

    @torch.no_grad()
    def step(self, *, applied: bool) -> StepLoads:
        """Take the loads since the last call and, if the optimizer moved, move the biases. Call it on every rank.

        `applied` must be the same on all ranks: False if the step was skipped (overflow, non-finite gradient).
        """
        if applied and not self._observed:
            raise ConfigError(
                "balancer.step: no router was seen at work since the last step; the model given to the balancer must "
                "be the one that is trained: run in training mode, with gradients"
            )
        self._observed = False
        loads = self._take_loads()
        if applied and self._rule is not None and self.rate:
            self._updates += 1
            for layer, load in zip(self._layers, loads, strict=True):
                self._move(layer, load)
        violations = torch.stack([max_violation(load.counts_E) for load in loads])
        return StepLoads(violations.nanmean(), dict(zip(self.biases, (load.counts_E for load in loads), strict=True)))

    def close(self) -> None:
        """Stop counting. The biases stay where they are, in the model."""
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> State:
        """Biases, the rule's own tensors and the number of updates; identical on every rank. Save it with the model.

        The model's own state dict has the biases too, but loaders cast them; this is what makes resuming exact.
        """
        state: State = {f"bias.{i}": layer.router.bias_E.clone() for i, layer in enumerate(self._layers)}
        for i, layer in enumerate(self._layers):
            state |= {f"{name}.{i}": tensor.clone() for name, tensor in layer.state.items()}
        return state | {"updates": self._updates, "rule": self.rule_name}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, StateValue]) -> None:
        """Take back what `state_dict` gave. Of another rule only the biases are taken over.

        Raises ConfigError if it is of a model with other routers.
        """
        saved = [_float32(state[f"bias.{i}"]) for i in range(sum(key.startswith("bias.") for key in state))]
        if [len(bias_E) for bias_E in saved] != [layer.router.num_experts for layer in self._layers]:
            raise ConfigError(
                f"saved balancer state has routers with {[len(bias_E) for bias_E in saved]} experts, "
                f"this model has {[layer.router.num_experts for layer in self._layers]}"
            )
        same_rule = state["rule"] == self.rule_name
        self._updates = int(cast(int, state["updates"])) if same_rule else 0
        for i, layer in enumerate(self._layers):
            layer.router.bias_E.copy_(saved[i])
            for name, tensor in layer.state.items():
                known = same_rule and f"{name}.{i}" in state  # states of earlier versions may have fewer tensors
                tensor.copy_(_float32(state[f"{name}.{i}"]) if known else torch.zeros_like(tensor))

    def _new_layer(self, router: ForeignRouter) -> _Layer:
        bias_E = router.bias_E
        counts_E = torch.zeros(bias_E.numel(), dtype=torch.int64, device=bias_E.device)
        thresholds_EQ = None
        if self._rule is not None and self._rule.needs_thresholds:
            thresholds_EQ = counts_E.new_zeros((bias_E.numel(), THRESHOLD_BINS))
        names = () if self._rule is None else self._rule.state
        return _Layer(router, {name: torch.zeros_like(bias_E) for name in names}, counts_E, thresholds_EQ)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._counting = module.training and torch.is_grad_enabled()
        mask = _argument(module, args, kwargs, "attention_mask")
        self._mask = mask.flatten().bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._counting = self._mask = None

    def _observer(self, layer: _Layer) -> Callable[..., None]:
        @torch.compiler.disable
        def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
            # Inside a backward the only forwards are recomputations of what was counted before. Gradients may be off
            # inside a checkpointed block, so the model's own forward decides; a part of it called alone for itself.
            counting = module.training and torch.is_grad_enabled() if self._counting is None else self._counting
            if not counting or torch._C._current_graph_task_id() != -1:
                return
            with torch.no_grad():
                self._observe(layer, args, kwargs, outputs)

        return observe

    def _observe(self, layer: _Layer, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        """Add what a router has just done to its layer's loads."""
        router, indices_NK = layer.router, layer.router.indices(outputs)
        mask = self._mask
        if mask is None or mask.numel() != len(indices_NK):  # a vision tower's tokens, for instance: none is padding
            mask = torch.ones_like(indices_NK[:, 0], dtype=torch.bool)
        layer.top_k = indices_NK.shape[1]
        counts = count_tokens(indices_NK, mask, router.bias.numel())[: router.num_experts]
        layer.counts_E = layer.counts_E.to(counts.device) + counts
        self._observed = True
        if layer.thresholds_EQ is not None and self._rule is not None:
            if layer.scores is None:
                layer.scores = find_scores(router, args, kwargs, outputs)
            bias_E = router.bias_E
            layer.thresholds_EQ = layer.thresholds_EQ.to(bias_E.device) + threshold_histogram(
                layer.scores(logits_of(outputs)),
                bias_E,
                mask,
                top_k=layer.top_k,
                low=bias_E.min() - 1,
                high=bias_E.max() + 1,
                least_alpha=self._rule.least_alpha,
            )

    def _take_loads(self) -> list[Loads]:
        """What was counted since the last step, summed over ranks in one collective."""
        kept = [t for layer in self._layers for t in (layer.counts_E, layer.thresholds_EQ) if t is not None]
        device = self._layers[0].router.bias_E.device
        flat = ranks.all_reduce_(torch.cat([t.flatten().to(device) for t in kept]))
        parts = iter(flat.split([t.numel() for t in kept]))
        loads = []
        for layer in self._layers:
            bias_E = layer.router.bias_E
            counts_E = next(parts).to(bias_E.device)
            layer.counts_E = torch.zeros_like(counts_E)
            thresholds_EQ = None
            if layer.thresholds_EQ is not None:
                thresholds_EQ = next(parts).view_as(layer.thresholds_EQ).to(bias_E.device)
                layer.thresholds_EQ = torch.zeros_like(thresholds_EQ)
            share = layer.top_k / layer.router.num_experts
            loads.append(Loads(counts_E, thresholds_EQ, bias_E.min() - 1, bias_E.max() + 1, share))
        return loads

    def _move(self, layer: _Layer, load: Loads) -> None:
        assert self._rule is not None
        bias_E = layer.router.bias_E
        old = {name: tensor.to(bias_E.device) for name, tensor in layer.state.items()}
        new_E, state = apply_rule(self._rule, load, bias_E, old, n=self._updates, rate=self.rate, options=self._options)
        if layer.router.num_experts < layer.router.bias.numel():
            new_E = new_E - (new_E - bias_E).mean()  # on average as attractive as before to those left alone
        bias_E.copy_(new_E.clamp(-self._clamp, self._clamp) if self._clamp else new_E)
        layer.state |= state


def _checked(rule: RuleName, rate: float, clamp: float, options: Mapping[str, float]) -> Any:
    """The rule, or None for `none`. Raises ConfigError for what would be ignored or cannot work."""
    unknown = sorted(options.keys() - {field.name for field in fields(RuleOptions)})
    if unknown:
        raise ConfigError(f"balancer: unknown option {', '.join(unknown)}")
    if rule != "none" and rule not in RULES:
        raise ConfigError(f"balancer: unknown rule '{rule}'; known: {', '.join(RULES)}, none")
    problems = ExpertBiasConfig(rule=rule, rate=rate, clamp=clamp, options=RuleOptions(**options)).problems()
    if problems:
        raise ConfigError(*(f"balancer: {line}" for line in problems))
    found = RULES.get(rule)
    if found is not None and found.multiplicative:
        raise ConfigError("balancer: rule multiplicative needs a router that multiplies by its bias; this one adds it")
    return found


def _float32(value: StateValue) -> Tensor:
    """A saved tensor; JSON brings it back as a list."""
    return torch.as_tensor(value, dtype=torch.float32)


def _argument(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """An argument of the module's forward by its name, however it was passed; None if it was not."""
    if name in kwargs or not args:
        return kwargs.get(name)
    names = list(inspect.signature(module.forward).parameters)
    position = names.index(name) if name in names else len(args)
    return args[position] if position < len(args) else None
