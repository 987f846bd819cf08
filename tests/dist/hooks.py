"""Hooks that break things on purpose, named in configs by dotted path."""

import gc
import time
import weakref
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainer import ranks
from trainer.hooks import Hook, RunContext, StepContext, StepResult, StopReason


class Poison(Hook):
    """Makes one sample's loss, or the gradient of one parameter or of one expert, NaN on one rank from step `first` to
    step `last`."""

    def __init__(self, kind: Literal["loss", "gradient", "expert"], first: int, last: int, rank: int = 1) -> None:
        self._kind, self._steps, self._rank = kind, range(first, last + 1), rank
        self._step = 1

    def on_start(self, run: RunContext) -> None:
        if ranks.rank() != self._rank:
            return
        if self._kind == "loss":
            run.model.register_forward_hook(self._poison_loss)
        elif self._kind == "gradient":
            next(run.model.parameters()).register_hook(self._poison_gradient)
        else:
            run.model.get_parameter("blocks.1.mlp.experts.down").register_hook(self._poison_expert)

    def after_step(self, step: StepContext, result: StepResult) -> None:
        self._step = step.step + 1

    def _poison_loss(self, model: nn.Module, inputs: tuple[Tensor, ...], losses_BT: Tensor) -> Tensor:
        if not model.training or self._step not in self._steps:
            return losses_BT
        mask = torch.zeros_like(losses_BT)
        mask[0, 3] = torch.nan
        return losses_BT + mask

    def _poison_expert(self, gradient_EFD: Tensor) -> Tensor:
        poisoned_EFD = gradient_EFD.clone()
        if self._step in self._steps:
            poisoned_EFD[-1, 0, 0] = torch.nan
        return poisoned_EFD

    def _poison_gradient(self, gradient: Tensor) -> Tensor:
        return gradient * torch.nan if self._step in self._steps else gradient


class SecondOwner(Hook):
    """Claims what SampleReweightHook owns."""

    owns = frozenset({"weights"})


class Thief(Hook):
    """Sets weights it does not own."""

    def on_losses(self, step: StepContext) -> None:
        step.weights_B = torch.zeros_like(step.losses_B)


class RankLocalState(Hook):
    """Has another state on every rank, which no hook may."""

    def state_dict(self) -> dict[str, Tensor | int | float | str]:
        return {"rank": ranks.rank()}


class Slow(Hook):
    """Makes steps long enough to be killed between two of them."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def after_step(self, step: StepContext, result: StepResult) -> None:
        time.sleep(self._seconds)


class SilentError(Hook):
    """Adds 1e-6 to one number of a tensor on one rank after a step, as bad memory might."""

    def __init__(self, tensor: str, step: int, rank: int = 1) -> None:
        self._name, self._step, self._rank = tensor, step, rank

    def on_start(self, run: RunContext) -> None:
        self._model = run.model

    @torch.no_grad()
    def after_step(self, step: StepContext, result: StepResult) -> None:
        if step.step == self._step and ranks.rank() == self._rank:
            dict([*self._model.named_parameters(), *self._model.named_buffers()])[self._name].view(-1)[0] += 1e-6


class _Circle:
    itself: "_Circle"


class Circles(Hook):
    """Leaves an object that refers to itself behind in every step, and records how many of them are still there.

    Also how often Python has collected garbage since the step before, on the ranks with most and with fewest.
    """

    def on_start(self, run: RunContext) -> None:
        self._alive: weakref.WeakSet[_Circle] = weakref.WeakSet()
        self._collections = 0
        gc.callbacks.append(self._count)

    def after_step(self, step: StepContext, result: StepResult) -> None:
        circle = _Circle()
        circle.itself = circle
        self._alive.add(circle)
        step.record("test/circles", len(self._alive), "max")
        step.record("test/most_collections", self._collections, "max")
        step.record("test/fewest_collections", -self._collections, "max")
        self._collections = 0

    def on_stop(self, reason: StopReason) -> None:
        gc.callbacks.remove(self._count)

    def _count(self, phase: str, about: dict[str, Any]) -> None:
        self._collections += phase == "start"
