"""Expert balancing as a callback of transformers' Trainer, with or without DeepSpeed.

    Trainer(model, ..., callbacks=[BalanceExperts(rule="sign", rate=1e-3)])

Its state (biases, the rule's tensors, number of updates) lies in the checkpoint's `trainer_state.json` and is taken
from there on `train(resume_from_checkpoint=...)`, whatever `restore_callback_states_from_checkpoint` says. `moe/maxvio`
appears in `trainer.state.log_history`, and in the logs of callbacks that were added after this one.

The only module of moe that imports transformers.
"""

import logging
from typing import Any

from torch import Tensor

from moe.bias_hook import RuleName
from moe.foreign_routers import find_routers, keep_exact
from moe.outside import BiasBalancer, StepLoads

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise ImportError("moe.transformers_callback needs transformers: pip install 'transformers[torch]>=5'") from error

_log = logging.getLogger(__name__)


class BalanceExperts(TrainerCallback, ExportableState):
    """Moves the biases after each optimizer step that was not skipped; the arguments are BiasBalancer's.

    `balancer` is there while training runs, and `last` has the loads of the last step.
    """

    def __init__(self, rule: RuleName = "sign", rate: float = 1e-3, clamp: float = 0.0, **options: float) -> None:
        self._arguments: dict[str, Any] = {"rule": rule, "rate": rate, "clamp": clamp, **options}
        self.balancer: BiasBalancer | None = None
        self.last: StepLoads | None = None
        self.saved: dict[str, Any] = {}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the biases exact before an engine casts or shards the model."""
        for router in find_routers(kwargs["model"]):
            keep_exact(router)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start counting, from the checkpoint's state if there is one."""
        if self.balancer is not None:  # training begins again, with another batch size for instance
            self.balancer.close()
        self.balancer = BiasBalancer(kwargs["model"], **self._arguments)
        if state.global_step:
            saved = self.saved or _attributes(state.stateful_callbacks.get(type(self).__name__)).get("saved")
            if saved:
                self.balancer.load_state_dict(saved)
            else:
                _log.warning(
                    "the checkpoint has no state of BalanceExperts: biases are the model's, the rule starts anew"
                )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One optimizer step is over, over all micro-batches."""
        assert self.balancer is not None
        # False too for an optimizer that is not Accelerate's: it cannot skip.
        skipped = bool(getattr(kwargs["optimizer"], "step_was_skipped", False))
        self.last = self.balancer.step(applied=not skipped)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the balance of the last step to what is logged."""
        logs: dict[str, float] = kwargs["logs"]
        if self.last is not None and "loss" in logs:
            logs["moe/maxvio"] = float(self.last.max_violation)
            state.log_history[-1]["moe/maxvio"] = logs["moe/maxvio"]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop counting; the biases stay in the model."""
        if self.balancer is not None:
            self.balancer.close()

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into `trainer_state.json`: float32 numbers survive JSON exactly."""
        saved = {} if self.balancer is None else _plain(self.balancer.state_dict())
        return {"args": self._arguments, "attributes": {"saved": saved}}


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.tolist() if isinstance(value, Tensor) else value for key, value in state.items()}


def _attributes(entry: Any) -> dict[str, Any]:
    """The Trainer keeps one entry for a callback, or a list of them if there are several of the class."""
    if isinstance(entry, list):
        entry = entry[-1] if entry else {}
    return (entry or {}).get("attributes", {})
