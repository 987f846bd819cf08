"""What DeepSpeed's optimizer holds, shown where it lies: how a checkpoint reads it and writes it back.

DeepSpeed's own checkpoints are not used: they are pickled, tied to the number of ranks and do not know shared expert
stacks. `fragments` are views of the optimizer's numbers, and trainer/optimizer_state.py writes them.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer import ranks
from trainer.model_weights import expert_group
from trainer.optimizer_state import Fragment


class OptimizerView:
    """The numbers of the optimizer under DeepSpeed, by parameter of the whole model."""

    def __init__(self, module: nn.Module, optimizer: Any, zero_stage: int) -> None:
        """`optimizer`: what DeepSpeed has made of ours; `module`: the bare model it steps."""
        self._module = module
        self._optimizer = optimizer
        self._zero_stage = zero_stage

    def fragments(self) -> Iterator[Fragment]:
        """What this rank's optimizer holds, as views: reading them saves it, writing into them restores it.

        At stage 0 every rank holds everything, above it every element is held once.
        """
        masters = self._whole_masters()
        for name, parameter in self._module.named_parameters():
            size, offset = self._place_in_model(name, parameter)
            if masters is not None:
                master = masters[parameter]
                state = _adam_state(self.adam, master)
                values = [tensor.view(-1) for tensor in (master.detach(), state["exp_avg"], state["exp_avg_sq"])]
                yield Fragment(name, size, offset, *values)
                continue
            if self._zero_stage == 3:
                yield self._partition(name, parameter)
                continue
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:  # another rank has it
                continue
            flat = self.adam.param_groups[mapping.param_group_index]["params"][0]
            state, address = _adam_state(self.adam, flat), mapping.hp_fragment_address
            values = [
                tensor.narrow(0, address.start, address.numel)
                for tensor in (flat.detach(), state["exp_avg"], state["exp_avg_sq"])
            ]
            yield Fragment(name, size, offset + mapping.lp_fragment_address.start, *values)

    def _partition(self, name: str, parameter: nn.Parameter) -> Fragment:
        """This rank's part of a parameter at stage 3, where all are cut into equal parts, the last one padded."""
        optimizer = self._optimizer
        group, begin, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        flat, size = optimizer.fp32_partitioned_groups_flat[group], parameter.ds_numel  # type: ignore[attr-defined]
        state = _adam_state(self.adam, flat)
        start = min(length * ranks.rank(), size)
        values = [
            tensor.narrow(0, begin, min(length, size - start))
            for tensor in (flat.detach(), state["exp_avg"], state["exp_avg_sq"])
        ]
        return Fragment(name, size, start, *values)

    def parameter_sizes(self) -> dict[str, int]:
        """Elements of every parameter of the whole model."""
        return {name: self._place_in_model(name, parameter)[0] for name, parameter in self._module.named_parameters()}

    @property
    def clock(self) -> float:
        """Steps Adam has taken: what its bias corrections go by."""
        states = self._adam_states()
        return float(states[0]["step"]) if states else 0.0

    @clock.setter
    def clock(self, steps: float) -> None:
        for state in self._adam_states():
            state["step"].fill_(steps)

    @property
    def adam(self) -> torch.optim.Optimizer:
        """The optimizer that DeepSpeed has wrapped, if it has."""
        adam: torch.optim.Optimizer = getattr(self._optimizer, "optimizer", self._optimizer)
        return adam

    def forget_first_step(self) -> None:
        """Undo the step on zero gradients with which DeepSpeed's bf16 optimizer of stage 0 makes room for its state.

        It has decayed the weights once, and Adam's corrections would be one step ahead for the whole run.
        """
        if hasattr(self._optimizer, "fp32_groups"):
            for parameter, master in (self._whole_masters() or {}).items():
                master.detach().copy_(parameter.detach())
            self.clock = 0.0

    def _adam_states(self) -> list[dict[str, Tensor]]:
        return [state for state in self.adam.state.values() if state]

    def _whole_masters(self) -> dict[nn.Parameter, Tensor] | None:
        """The tensor Adam steps for each parameter, where that is a whole one; None if the engine has cut them."""
        if self._zero_stage:
            return None
        optimizer = self._optimizer
        if not hasattr(optimizer, "fp32_groups"):
            return {parameter: parameter for parameter in self._module.parameters()}
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        return {low: master for lows, masters in pairs for low, master in zip(lows, masters, strict=True)}

    def _place_in_model(self, name: str, parameter: nn.Parameter) -> tuple[int, int]:
        """Elements of the whole parameter, and where this rank's begin: experts are shares of one stack."""
        group = expert_group(self._module, name)
        if group is None:
            return getattr(parameter, "ds_numel", parameter.numel()), 0
        return parameter.numel() * dist.get_world_size(group), parameter.numel() * dist.get_rank(group)


def _adam_state(adam: torch.optim.Optimizer, tensor: Tensor) -> dict[str, Tensor]:
    """Adam's state of a tensor; zeros, as before its first step, if it has none yet."""
    state: dict[str, Tensor] = adam.state[tensor]
    if not state:
        on_device = adam.defaults.get("fused") or adam.defaults.get("capturable")
        state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device if on_device else "cpu")
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(tensor), torch.zeros_like(tensor)
    return state
