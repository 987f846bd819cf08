"""Weights of whole domains as a hook: fixed ones, or moved during the run by the excess over reference losses.

They act on the loss, or, with `target: sampling`, on how often each domain is drawn.

With `rule: doremi` this is the online form of DoReMi (arXiv 2305.10429) that needs no second model in the loop: a
domain's excess is its mean training loss over that of a reference run, as in Sheared LLaMA (arXiv 2310.06694, Algorithm
1). The form with a proxy model, and DoGE, which needs a gradient for each domain: `python -m launch.domain_weights`.

Shape letters: D domains.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from reweighting.domains import domain_factors, domain_means, doremi_update
from trainer.errors import ConfigError
from trainer.hooks import Hook, PhaseContext, RunContext, State, StateValue, StepContext, StepResult


@dataclass(frozen=True, kw_only=True)
class DomainReweightConfig:
    """How much each domain counts in the objective."""

    rule: Literal["static", "doremi"] = "static"
    """`static` keeps the weights; `doremi` moves them by excess losses."""
    target: Literal["loss", "sampling"] = "loss"
    """What the weights are: each domain's share of the objective, whatever is sampled, or of the samples themselves."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weight of each domain, fixed or at the start; divided by their sum. Empty: the same for all."""
    reference_run: str = ""
    """`doremi`: run folder whose last evaluation gives each domain's reference loss."""
    reference_losses: dict[str, float] = field(default_factory=dict)
    """`doremi`: the reference losses themselves, in nats a token, instead of a run."""
    eta: float = 1.0
    """`doremi`: size of a step."""
    smoothing: float = 1e-3
    """`doremi`: share that is spread evenly over the domains at each step."""
    every: int = 1
    """`doremi`: applied steps between updates; losses in between are averaged."""

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        found = [
            f"weights.{name}: {weight} must be finite and positive"
            for name, weight in self.weights.items()
            if not (math.isfinite(weight) and weight > 0)
        ]
        if self.rule == "static" and not self.weights:
            found.append("weights: rule static needs the weight of each domain")
        if self.rule == "static" and self.target == "sampling":
            found.append("target: fixed weights of the sampling are data.weights; use them, or rule doremi")
        if self.rule == "doremi" and bool(self.reference_run) == bool(self.reference_losses):
            found.append("reference_run: rule doremi needs either this or reference_losses")
        default = DomainReweightConfig()
        for name in ("reference_run", "reference_losses", "eta", "smoothing", "every"):
            if self.rule == "static" and getattr(self, name) != getattr(default, name):
                found.append(f"{name}: rule static does not read it; remove it")
        if not (math.isfinite(self.eta) and self.eta > 0):
            found.append(f"eta: {self.eta} must be finite and positive")
        if not 0 <= self.smoothing < 1:
            found.append(f"smoothing: {self.smoothing} must be in [0, 1)")
        if self.every < 1:
            found.append(f"every: {self.every} must be at least 1")
        return found


class DomainReweightHook(Hook):
    """Owns the factors on the weights of each domain's samples, or the mixture that samples are drawn from."""

    Config = DomainReweightConfig

    def __init__(self, config: DomainReweightConfig) -> None:
        self._config = config
        self.owns = frozenset({"sampling" if config.target == "sampling" else "domain_factors"})
        self._has_moved = True  # the sampling begins with our weights, not with data.weights
        self._names: tuple[str, ...] = ()
        self._alpha_D = torch.empty(0)
        self._shares_D = torch.empty(0)
        self._reference_D = torch.empty(0)
        self._excess_D = torch.empty(0)
        self._sums_2D = torch.empty(0)
        self._since_update = 0

    def on_start(self, run: RunContext) -> None:
        """Line the configured numbers up with the domains of the corpus.

        Raises ConfigError if a domain is unknown, or has no weight or reference loss.
        """
        config = self._config
        self._names = run.domain_names

        def by_domain(values: Mapping[str, float], what: str) -> Tensor:
            for name in values.keys() - set(run.domain_names):
                raise ConfigError(f"{what}.{name}: no such domain; the corpus has {', '.join(run.domain_names)}")
            for name in set(run.domain_names) - values.keys():
                raise ConfigError(f"{what}: domain {name} is missing; give a value for each domain of the corpus")
            return torch.tensor([values[name] for name in run.domain_names], dtype=torch.float64, device=run.device)

        weights = config.weights or dict.fromkeys(run.domain_names, 1.0)
        alpha_D = by_domain(weights, "hooks.domain_reweight.weights")
        self._alpha_D = alpha_D / alpha_D.sum()
        self._shares_D = torch.tensor(run.domain_shares, dtype=torch.float64, device=run.device)
        if config.rule == "doremi":
            losses = config.reference_losses or _evaluated_losses(Path(config.reference_run), run.domain_names)
            self._reference_D = by_domain(losses, "hooks.domain_reweight.reference_losses")
        self._excess_D = torch.zeros_like(alpha_D)
        self._sums_2D = torch.zeros(2, len(alpha_D), dtype=torch.float64, device=run.device)

    def on_phase(self, phase: PhaseContext) -> None:
        """Factors are relative to how often a domain is drawn now."""
        self._shares_D = torch.tensor(phase.domain_shares, dtype=torch.float64, device=self._shares_D.device)

    def sampling_weights(self) -> Tensor | None:
        """alpha, if it has moved."""
        has_moved, self._has_moved = self._has_moved, False
        return self._alpha_D if has_moved else None

    def domain_factors(self) -> Tensor:
        """alpha_d over the share of samples that come from domain d, [D]."""
        return domain_factors(self._alpha_D, self._shares_D)

    def on_losses(self, step: StepContext) -> None:
        """Record the weights in force."""
        for name, alpha in zip(self._names, self._alpha_D, strict=True):
            step.record(f"domain/{name}/alpha", alpha)

    def after_step(self, step: StepContext, result: StepResult) -> None:
        """Add up the losses of applied steps, and move the weights every so many of them."""
        if self._config.rule == "static" or not result.applied:
            return
        means_D, tokens_D = domain_means(step.losses_B, step.tokens_B, step.domains_B, len(self._alpha_D))
        self._sums_2D += torch.stack([torch.where(tokens_D > 0, means_D * tokens_D, 0.0), tokens_D])
        self._since_update += 1
        if self._since_update < self._config.every:
            return
        loss_sums_D, tokens_D = self._sums_2D
        excess_D = (loss_sums_D / tokens_D - self._reference_D).clamp(min=0)
        # A domain that did not occur keeps the excess it had.
        self._excess_D = torch.where(tokens_D > 0, excess_D, self._excess_D)
        self._alpha_D = doremi_update(
            self._alpha_D, self._excess_D, eta=self._config.eta, smoothing=self._config.smoothing
        )
        self._sums_2D = torch.zeros_like(self._sums_2D)
        self._since_update = 0
        self._has_moved = True

    def state_dict(self) -> State:
        """Weights, reference losses, and what was added up since the last update."""
        return {
            "domains": "\n".join(self._names),
            "alpha": self._alpha_D.clone(),
            "reference": self._reference_D.clone(),
            "excess": self._excess_D.clone(),
            "sums": self._sums_2D.clone(),
            "since_update": self._since_update,
        }

    def load_state_dict(self, state: Mapping[str, StateValue]) -> None:
        """Take back what `state_dict` gave; fixed weights are those of the config.

        Raises ConfigError if the state is of other domains.
        """
        if state["domains"] != "\n".join(self._names):
            raise ConfigError("hooks.domain_reweight: the checkpoint has weights of other domains")
        if self._config.rule == "static":
            return
        device = self._alpha_D.device
        self._alpha_D, self._reference_D, self._excess_D, self._sums_2D = (
            torch.as_tensor(state[key]).to(device) for key in ("alpha", "reference", "excess", "sums")
        )
        self._since_update = int(state["since_update"])
        self._has_moved = False  # the checkpoint of the data has what was asked for


def _evaluated_losses(run_dir: Path, names: tuple[str, ...]) -> dict[str, float]:
    """Each domain's held-out loss at the last evaluation of a run."""
    path = run_dir / "metrics.jsonl"
    last = ""
    try:
        with path.open() as lines:  # one by one: there may be a million
            for line in lines:
                last = line if '"eval/loss"' in line else last
        row = json.loads(last) if last else None
    except (OSError, ValueError) as error:
        raise ConfigError(f"hooks.domain_reweight.reference_run: {path} cannot be read ({error})") from error
    if row is None:
        raise ConfigError(f"hooks.domain_reweight.reference_run: {path} holds no evaluation")
    found = {name: row.get(f"eval/{name}/ppl") for name in names}
    return {name: math.log(ppl) for name, ppl in found.items() if ppl}
