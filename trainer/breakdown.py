"""The parts of forward, backward and optimizer: attention, router, dispatch, experts, combine, head, reduction, Adam.

Nothing of it is there unless `profile.breakdown` asks for it. Then modules get forward hooks, the tensors between them
gradient hooks, and each of these switches the phase clock to a part. Values never change, so neither do results.

Decisions:
- Parts are told by the model: `timed_parts()` yields (name, module). A part is the module's forward; in the backward
  it begins when the gradient of its output is there, and ends with that of its input. What is no module is divided by
  `trainer.phases.cut`: from there on, to the end of the module around it, it is another part.
- A part that runs forward inside a backward is `recompute`, whichever it is. What a part makes again of its own insides
  (`activation_recompute: selective`) belongs to its backward.
- Reduction, clipping and Adam are methods of DeepSpeed's objects; the engine names them (`Engine.seams`).
- Between the ends of two parts lie residual sums and the like: `backbone` inside the model, `engine` outside it.
"""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from trainer.engine import Engine
from trainer.phases import PhaseClock, set_cut

_WHOLE = "backbone"


class Breakdown:
    """Divides the phases of `clock` for as long as it is attached."""

    def __init__(self, engine: Engine, clock: PhaseClock) -> None:
        self._clock = clock
        self._stack: list[str] = []
        self._outputs = WeakTensorKeyDictionary()  # of parts, as a set
        self._undo: list[Callable[[], None]] = []
        module = engine.module
        parts: list[tuple[str, nn.Module]] = [(_WHOLE, module), *getattr(module, "timed_parts", tuple)()]
        for name, part in parts:
            self._undo.append(part.register_forward_pre_hook(self._before(name), with_kwargs=True).remove)
            self._undo.append(part.register_forward_hook(self._after(name)).remove)
        for name, owner, method in engine.seams():
            self._wrap(name, owner, method)
        set_cut(self._cut)

    def detach(self) -> None:
        """Leave model and engine as they were."""
        set_cut(None)
        for undo in self._undo:
            undo()
        self._undo.clear()

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._clock.is_running:
                return
            if self._clock.current.startswith("backward"):
                self._clock.switch("backward/recompute")
                return
            if name == _WHOLE:
                self._stack.clear()
            outer = self._stack[-1] if self._stack else ""
            self._mark([*args, *kwargs.values()], outer, is_input=True)
            self._stack.append(name)
            self._clock.switch(f"forward/{name}")

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # A recomputation may end half way through: it has no parts, and nothing here to undo.
            if not self._clock.is_running or not self._clock.current.startswith("forward"):
                return
            self._mark([output], self._stack[-1])
            if name == _WHOLE:
                self._stack.clear()
            else:
                self._stack.pop()
            self._clock.switch(f"forward/{self._stack[-1]}" if self._stack else "forward")

        return hook

    def _cut(self, part: str, tensor: Tensor) -> None:
        if not self._clock.is_running or not self._stack or not self._clock.current.startswith("forward"):
            return
        self._mark([tensor], self._stack[-1])
        self._stack[-1] = part
        self._clock.switch(f"forward/{part}")

    def _mark(self, values: list[Any], part: str, *, is_input: bool = False) -> None:
        """When the backward reaches one of these tensors, what follows is `part`; "" is the engine.

        Where one part's output is another's input, the backward leaves the one and enters the other: it is the output
        that tells which.
        """

        def hook(gradient: Tensor) -> None:
            if self._clock.is_running and self._clock.current.startswith("backward"):
                self._clock.switch(f"backward/{part}" if part else "backward")

        if torch.is_grad_enabled():
            for tensor in _tensors(values):
                if tensor.requires_grad and tensor.is_floating_point() and not (is_input and tensor in self._outputs):
                    tensor.register_hook(hook)
                    if not is_input:
                        self._outputs[tensor] = None

    def _wrap(self, name: str, owner: Any, method: str) -> None:
        original = getattr(owner, method)

        @wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._clock.phase(name):
                return original(*args, **kwargs)

        setattr(owner, method, timed)  # on this object; its class is left alone
        self._undo.append(lambda: delattr(owner, method))


def _tensors(values: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dictionaries."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
