"""What plugs into the training loop: the hook protocol and the narrow views a hook gets.

The loop, with every event in place:

    on_start(run)
    sampling_weights()                             the mixture to begin with, if a hook owns the sampling
    for each optimizer step:
        on_phase(phase)                            only if the mixture of the data changes with this step
        domain_factors(), frozen_weights()         what is fixed before the step, if anything
        for each micro-batch: fetch, forward -> token losses -> token_weights(losses) -> sample losses
        on_losses(step)            all B sample losses of this step; the owner of "weights" may set them
        backward of sum_i c_i l_i, micro-batch by micro-batch
        before_last_backward(step) every forward is over: what the hooks sum over ranks can travel meanwhile
        the last backward, gradients reduced, clipped
        before_step(step)
        result = engine.step()     applied or skipped, decided alike on every rank
        after_step(step, result)   the owner of "expert_bias" moves it here, only when result.applied
        sampling_weights()         a new mixture, which acts data.sampling_delay steps from now
        every n steps: on_evaluate_domain(domain) after each held-out domain, on_evaluate(evaluation), checkpoint,
                       metrics
    on_stop(reason)                always called; no collectives when the reason is an error

Decisions:
- The step view is global: B counts all samples of the optimizer step (ranks x micro-batches), sorted by
  sample id, identical on every rank. A rule that is a pure function of it cannot depend on how the batch
  was cut, and a hook needs no collective to see the whole batch.
- A hook never sees the engine, the optimizer or the loader.
- Each writable slot ("weights", "token_weights", "domain_factors", "sampling", "expert_bias", or a user's own name) has
  at most one owner per run.
- A sample is a row of tokens, unless the owner of the weights weighs documents: then every row counts as
  `samples_per_row` samples, of which those beyond its documents have no target tokens.
- Schedules count `applied_steps`, so that a skipped step leaves no trace.

Shape letters: B samples of one optimizer step.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from trainer.errors import ConfigError

MetricReduction = Literal["mean", "sum", "max", "same"]
"""How a recorded value becomes one number: reduced over ranks, or "same" if all ranks hold it already."""

StopReason = Literal["done", "preempted", "error"]

StateValue = Tensor | int | float | str
State = dict[str, StateValue]

MetricValue = Tensor | float | list[dict[str, Any]]
"""A number, a vector or matrix, or a table as a list of rows."""

FrozenWeights = Callable[[Tensor, Tensor], Tensor]
"""(losses_s, valid_s) -> weights_s up to a factor that is the same for all samples of the step; 0 where invalid."""


class Recorder(Protocol):
    """Where metrics go; values may stay on the device until they are written."""

    def record(self, name: str, value: MetricValue, reduction: MetricReduction = "same") -> None: ...


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What a hook may know about the run as a whole."""

    model: nn.Module
    """The bare model, for hooks that look for their modules in it (routers, for instance)."""
    total_steps: int
    global_batch_size: int
    domain_names: tuple[str, ...]
    domain_shares: tuple[float, ...]
    """Share of the samples that each domain provides to begin with; they sum to one. `on_phase` tells later ones."""
    run_dir: Path
    device: torch.device
    seed: int
    samples_per_row: int
    """Samples that each row counts as: 1, or the most documents a row may hold where documents are weighed."""
    has_weights: bool
    """Whether some hook weighs samples or domains."""
    is_frozen: bool
    """Whether steps run with weights that are fixed before them (train.accumulation=frozen)."""
    excerpts: Callable[[Sequence[tuple[int, int | None]]], list[str]]
    """Beginnings of the texts of samples (row number, which document of it or None). Reads files: not for each step."""


@dataclass(frozen=True, kw_only=True)
class PhaseContext:
    """A mixture of domains that the coming step is drawn from."""

    number: int
    """From 0, counted over the whole run."""
    first_sample: int
    domain_shares: tuple[float, ...]
    """Share of the phase's samples that each domain provides; they sum to one."""


@dataclass(kw_only=True)
class StepContext:
    """One optimizer step over the global batch, identical on every rank but for `own_S`. Sorted by row and part."""

    step: int
    """Number of this step, from 1."""
    applied_steps: int
    """Optimizer updates applied before this step: the clock of every schedule."""
    sample_ids_B: Tensor  # int64, number of the row
    parts_B: Tensor  # int64, which document of its row; 0 where rows are the samples
    domains_B: Tensor  # int64, index into RunContext.domain_names
    tokens_B: Tensor  # int64, target tokens that count in the loss
    losses_B: Tensor  # float64, detached mean cross-entropy; 0 where tokens_B is 0
    own_S: Tensor  # int64, where this rank's samples lie among all, in the order they were forwarded
    recorder: Recorder
    used_B: Tensor | None = None
    """Frozen steps: the coefficients that were used already, so that weights set now are for comparison only."""
    coefficients_B: Tensor | None = None
    """Factor of each sample's loss in the objective, float64, summing to one; known once `on_losses` is over."""
    _weights_B: Tensor | None = None
    _weights_owner: bool = field(default=False, repr=False)

    @property
    def valid_B(self) -> Tensor:
        """Samples with at least one target token. Others must get weight zero and enter no statistic."""
        return self.tokens_B > 0

    @property
    def weights_B(self) -> Tensor | None:
        """Sample weights of this step (sum to one, zero where invalid), or None if nobody set them."""
        return self._weights_B

    @weights_B.setter
    def weights_B(self, weights_B: Tensor) -> None:
        if not self._weights_owner:
            raise ConfigError('hook sets step.weights_B without owning it: declare owns = frozenset({"weights"})')
        if weights_B.shape != self.losses_B.shape:
            raise ConfigError(
                f"hook sets weights_B of shape {tuple(weights_B.shape)}, the step has {tuple(self.losses_B.shape)}"
            )
        self._weights_B = weights_B.detach()

    def record(self, name: str, value: Tensor | float, reduction: MetricReduction = "same") -> None:
        """Add a metric to this step's record. Call it on every rank or on none."""
        self.recorder.record(name, value, reduction)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What the engine did."""

    applied: bool
    """False if the step was skipped (non-finite loss or gradient); alike on every rank."""
    reason: str
    """Why it was skipped; empty if applied."""


@dataclass(kw_only=True)
class EvaluationContext:
    """One finished evaluation on the held-out split."""

    step: int
    tokens: int
    """Held-out target tokens seen, over all ranks and domains."""
    recorder: Recorder

    def record(self, name: str, value: MetricValue, reduction: MetricReduction = "same") -> None:
        """Add a metric to this evaluation's record. Call it on every rank or on none."""
        self.recorder.record(name, value, reduction)


class Hook:
    """Base of all hooks: override what you need. Collectives are allowed everywhere but in `on_stop("error")`."""

    owns: frozenset[str] = frozenset()
    """Writable slots this hook owns. Two owners of one slot are refused when the run is built."""
    needs: frozenset[str] = frozenset()
    """Slots that some hook must own for this one to do its work; a run without an owner is refused."""
    needs_batch_losses: bool = False
    """True if `on_losses` must see every loss of the step before the first backward (to set weights)."""
    weighs: Literal["rows", "documents"] = "rows"
    """What one sample is to the owner of the weights."""
    frozen_problem: str = "sets no weights"
    """Why this hook cannot do with weights that are fixed before the step; empty if it can (see `frozen_weights`)."""
    exact_problem: str = ""
    """Which of its options are of use only with such weights, in a run without them; empty if none is."""
    version: int = 1
    """Version of `state_dict`; raise it when the layout changes."""

    def on_start(self, run: RunContext) -> None:
        """The model is built and nothing has run yet. Raise ConfigError here if the hook cannot do its work."""

    def on_phase(self, phase: PhaseContext) -> None:
        """The coming step is drawn from this mixture. Called before the first step, after a resume too, and at changes.

        A step in which a phase begins counts to it.
        """

    def sampling_weights(self) -> Tensor | None:
        """The mixture wanted from now on, a weight of each domain [D], or None to keep it. For the owner of "sampling".

        Asked before the first step of a run, where it acts at once, and after every step, where it acts
        data.sampling_delay steps later: samples before that were read ahead. The same on every rank, as all hook state.
        """
        return None

    def domain_factors(self) -> Tensor | None:
        """Factor on the weights of each domain's samples in the coming step, [D], or None. For the slot's owner."""
        return None

    def token_weights(self, losses_bT: Tensor) -> Tensor:
        """Weight of each token from its cross-entropy, [b, T]; called for the owner of "token_weights" alone.

        It must be a function of the token's loss only, for it sees one micro-batch. The loop divides by the mean weight
        over all target tokens of the step.
        """
        return torch.ones_like(losses_bT)

    def frozen_weights(self, applied_steps: int) -> FrozenWeights | None:
        """Weights up to a common factor as a function fixed now, before the step, or None if this step must be exact.

        Asked of the owner of "weights" under train.accumulation=frozen.
        """
        return None

    def on_losses(self, step: StepContext) -> None:
        """Every sample loss of the step is known. If `needs_batch_losses`, no backward has run yet.

        In a frozen step (`step.used_B` is set) all but one backward are over, and weights set here change nothing.
        """

    def before_last_backward(self, step: StepContext) -> None:
        """Every forward of the step is over, and its last backward, which reduces the gradients, is about to begin.

        The place to start a collective whose result `after_step` needs (`ranks.start_all_reduce_`). Not called in a
        step that is skipped for its losses.
        """

    def before_step(self, step: StepContext) -> None:
        """Gradients are complete; the optimizer has not moved."""

    def after_step(self, step: StepContext, result: StepResult) -> None:
        """The optimizer moved, or the step was skipped."""

    def on_evaluate_domain(self, domain: int) -> None:
        """The model has just seen, in eval mode, this rank's held-out rows of a domain (index into `domain_names`)."""

    def on_evaluate(self, evaluation: EvaluationContext) -> None:
        """An evaluation has ended; the model has seen the held-out data in eval mode."""

    def on_stop(self, reason: StopReason) -> None:
        """The run ends. Always called. Other ranks may be gone when the reason is "error": no collectives."""

    def state_dict(self) -> State:
        """Plain tensors, numbers and strings, identical on every rank."""
        return {}

    def load_state_dict(self, state: Mapping[str, StateValue]) -> None:
        """Take back what `state_dict` gave."""
        if state:
            raise ValueError(f"{type(self).__name__} has no state but was given {sorted(state)}")


class HookList:
    """The hooks of a run by name, called in config order."""

    def __init__(self, hooks: Mapping[str, Hook]) -> None:
        self._hooks = dict(hooks)
        owners: dict[str, str] = {}
        for name, hook in self._hooks.items():
            for slot in hook.owns:
                if slot in owners:
                    raise ConfigError(
                        f"hooks.{name}: '{slot}' is already owned by hooks.{owners[slot]}; disable one of them"
                    )
                owners[slot] = name
        for name, hook in self._hooks.items():
            for slot in sorted(hook.needs - owners.keys()):
                raise ConfigError(f"hooks.{name}: needs a hook that sets '{slot}'; enable one or change its options")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._hooks)

    @property
    def needs_batch_losses(self) -> bool:
        """True if losses of the whole step must be known before its first backward. Owning weights implies it."""
        return any(hook.needs_batch_losses or hook.owns & {"weights", "token_weights"} for hook in self._hooks.values())

    @property
    def has_weights(self) -> bool:
        """True if samples or domains get weights."""
        return any(hook.owns & {"weights", "domain_factors"} for hook in self._hooks.values())

    @property
    def weighs_documents(self) -> bool:
        """True if the owner of the weights weighs documents, not rows."""
        owner = self._owner("weights")
        return owner is not None and owner.weighs == "documents"

    @property
    def frozen_problem(self) -> str:
        """Why these hooks cannot run under train.accumulation=frozen; empty if they can."""
        owner = self._owner("weights")
        if owner is None:
            return "no hook sets weights"
        if any(hook.needs_batch_losses and hook is not owner for hook in self._hooks.values()):
            return "another hook needs all losses before the backward"
        return owner.frozen_problem

    @property
    def exact_problems(self) -> list[str]:
        """What these hooks are told that is of use only under train.accumulation=frozen."""
        return [hook.exact_problem for hook in self._hooks.values() if hook.exact_problem]

    @property
    def sets_sampling(self) -> bool:
        """True if a hook sets the weights that domains are sampled with."""
        return self._owner("sampling") is not None

    @property
    def moves_bias(self) -> bool:
        """True if a hook moves the biases of the experts."""
        return self._owner("expert_bias") is not None

    def sampling_weights(self) -> list[float] | None:
        """What the owner of "sampling" wants from now on, or None if it changes nothing or there is none."""
        owner = self._owner("sampling")
        weights_D = None if owner is None else owner.sampling_weights()
        return None if weights_D is None else weights_D.double().tolist()

    def domain_factors(self) -> Tensor | None:
        """What the owner of "domain_factors" has for the coming step, [D], or None."""
        owner = self._owner("domain_factors")
        return None if owner is None else owner.domain_factors()

    def token_weights(self, losses_bT: Tensor) -> Tensor | None:
        """What the owner of "token_weights" makes of a micro-batch's token losses, or None if there is no owner."""
        owner = self._owner("token_weights")
        return None if owner is None else owner.token_weights(losses_bT)

    def frozen_weights(self, applied_steps: int) -> FrozenWeights | None:
        """What the owner of "weights" fixes for the coming step, or None if the step must be exact."""
        owner = self._owner("weights")
        return None if owner is None else owner.frozen_weights(applied_steps)

    def _owner(self, slot: str) -> Hook | None:
        return next((hook for hook in self._hooks.values() if slot in hook.owns), None)

    def on_start(self, run: RunContext) -> None:
        for hook in self._hooks.values():
            hook.on_start(run)

    def on_phase(self, phase: PhaseContext) -> None:
        for hook in self._hooks.values():
            hook.on_phase(phase)

    def on_losses(self, step: StepContext) -> None:
        for hook in self._hooks.values():
            step._weights_owner = "weights" in hook.owns
            hook.on_losses(step)
        step._weights_owner = False

    def before_last_backward(self, step: StepContext) -> None:
        for hook in self._hooks.values():
            hook.before_last_backward(step)

    def before_step(self, step: StepContext) -> None:
        for hook in self._hooks.values():
            hook.before_step(step)

    def after_step(self, step: StepContext, result: StepResult) -> None:
        for hook in self._hooks.values():
            hook.after_step(step, result)

    def on_evaluate_domain(self, domain: int) -> None:
        for hook in self._hooks.values():
            hook.on_evaluate_domain(domain)

    def on_evaluate(self, evaluation: EvaluationContext) -> None:
        for hook in self._hooks.values():
            hook.on_evaluate(evaluation)

    def on_stop(self, reason: StopReason) -> None:
        for hook in self._hooks.values():
            hook.on_stop(reason)

    def state_dict(self) -> dict[str, tuple[int, State]]:
        """Version and state of every hook by name."""
        return {name: (hook.version, hook.state_dict()) for name, hook in self._hooks.items()}

    def load_state_dict(self, states: Mapping[str, tuple[int, State]]) -> list[str]:
        """Restore every hook that has a saved state; return a line for each one that was added or removed."""
        notes = []
        for name, hook in self._hooks.items():
            if name not in states:
                notes.append(f"hooks.{name} is new in this run: it starts from its initial state")
                continue
            version, state = states[name]
            if version != hook.version:
                raise ConfigError(f"hooks.{name}: saved state has version {version}, this code reads {hook.version}")
            hook.load_state_dict(state)
        for name in states.keys() - self._hooks.keys():
            notes.append(f"hooks.{name} is saved in the checkpoint but not in this run: its state is dropped")
        return notes

    def digest(self) -> int:
        """63-bit hash of all hook state: equal on two ranks if and only if their state is."""
        sha = hashlib.sha256()
        for name, (version, state) in sorted(self.state_dict().items()):
            sha.update(f"{name}:{version}".encode())
            for key, value in sorted(state.items()):
                sha.update(key.encode())
                if isinstance(value, Tensor):
                    sha.update(str(value.dtype).encode() + str(tuple(value.shape)).encode())
                    sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
                else:
                    sha.update(repr(value).encode())
        return int.from_bytes(sha.digest()[:8], "big") >> 1
