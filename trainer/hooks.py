"""What plugs into the training loop: the hook protocol and the narrow views a hook gets.

The loop, with every event in place:

    on_start(run)
    for each optimizer step:
        for each micro-batch: fetch, forward -> token losses -> sample losses
        on_losses(step)            all B sample losses of this step; the owner of "weights" may set them
        backward of sum_i c_i l_i, gradients reduced, clipped
        before_step(step)
        result = engine.step()     applied or skipped, decided alike on every rank
        after_step(step, result)   the owner of "expert_bias" moves it here, only when result.applied
        every n steps: on_evaluate_domain(domain) after each held-out domain, on_evaluate(evaluation), checkpoint,
                       metrics
    on_stop(reason)                always called; no collectives when the reason is an error

Decisions:
- The step view is global: B counts all samples of the optimizer step (ranks x micro-batches), sorted by
  sample id, identical on every rank. A rule that is a pure function of it cannot depend on how the batch
  was cut, and a hook needs no collective to see the whole batch.
- A hook never sees the engine, the optimizer or the loader.
- Each writable slot ("weights", "expert_bias", or a user's own name) has at most one owner per run.
- Schedules count `applied_steps`, so that a skipped step leaves no trace.

Shape letters: B samples of one optimizer step.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from trainer.errors import ConfigError

MetricReduction = Literal["mean", "sum", "max", "same"]
"""How a recorded value becomes one number: reduced over ranks, or "same" if all ranks hold it already."""

StopReason = Literal["done", "preempted", "error"]

StateValue = Tensor | int | float | str
State = dict[str, StateValue]


class Recorder(Protocol):
    """Where metrics go; values may stay on the device until they are written."""

    def record(self, name: str, value: Tensor | float, reduction: MetricReduction = "same") -> None: ...


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What a hook may know about the run as a whole."""

    model: nn.Module
    """The bare model, for hooks that look for their modules in it (routers, for instance)."""
    total_steps: int
    global_batch_size: int
    domain_names: tuple[str, ...]
    run_dir: Path
    device: torch.device
    seed: int


@dataclass(kw_only=True)
class StepContext:
    """One optimizer step over the global batch, identical on every rank. Rows are sorted by sample id."""

    step: int
    """Number of this step, from 1."""
    applied_steps: int
    """Optimizer updates applied before this step: the clock of every schedule."""
    sample_ids_B: Tensor  # int64
    domains_B: Tensor  # int64, index into RunContext.domain_names
    tokens_B: Tensor  # int64, target tokens that count in the loss
    losses_B: Tensor  # float32, detached mean cross-entropy; 0 where tokens_B is 0
    recorder: Recorder
    _weights_B: Tensor | None = None
    _weights_owner: bool = field(default=False, repr=False)

    @property
    def valid_B(self) -> Tensor:
        """Samples with at least one target token. Others must get weight zero and enter no statistic."""
        return self.tokens_B > 0

    @property
    def weights_B(self) -> Tensor | None:
        """Sample weights of this step (float32, sum to one, zero where invalid), or None if nobody set them."""
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

    def record(self, name: str, value: Tensor | float, reduction: MetricReduction = "same") -> None:
        """Add a metric to this evaluation's record. Call it on every rank or on none."""
        self.recorder.record(name, value, reduction)


class Hook:
    """Base of all hooks: override what you need. Collectives are allowed everywhere but in `on_stop("error")`."""

    owns: frozenset[str] = frozenset()
    """Writable slots this hook owns. Two owners of one slot are refused when the run is built."""
    needs_batch_losses: bool = False
    """True if `on_losses` must see every loss of the step before the first backward (to set weights)."""
    version: int = 1
    """Version of `state_dict`; raise it when the layout changes."""

    def on_start(self, run: RunContext) -> None:
        """The model is built and nothing has run yet. Raise ConfigError here if the hook cannot do its work."""

    def on_losses(self, step: StepContext) -> None:
        """Every sample loss of the step is known. If `needs_batch_losses`, no backward has run yet."""

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

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._hooks)

    @property
    def needs_batch_losses(self) -> bool:
        """True if losses of the whole step must be known before its first backward. Owning the weights implies it."""
        return any(hook.needs_batch_losses or "weights" in hook.owns for hook in self._hooks.values())

    def on_start(self, run: RunContext) -> None:
        for hook in self._hooks.values():
            hook.on_start(run)

    def on_losses(self, step: StepContext) -> None:
        for hook in self._hooks.values():
            step._weights_owner = "weights" in hook.owns
            hook.on_losses(step)
        step._weights_owner = False

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
