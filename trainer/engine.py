"""The DeepSpeed engine behind three verbs, forward, backward and step.

Decisions:
- DeepSpeed sees a gradient accumulation of one; we tell it which backward is the last of a step. It never
  scales the loss: objectives arrive normalised over the global batch, and the factor W here only undoes
  its averaging over ranks.
- Learning rate: set by us before each step, so that a skipped step cannot advance a scheduler.
- A step whose gradients are not finite changes nothing. DeepSpeed 0.19 checks that itself except for fp32 at
  stage 0, where it would apply NaN; there the norm, the check and the clipping are ours.

Its settings are in trainer/engine_config.py, what its optimizer holds is seen through trainer/engine_state.py, and
trainer/deepspeed_door.py is where deepspeed is imported.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer import deepspeed_door, ranks
from trainer.engine_choices import zero_table
from trainer.engine_config import EngineConfig
from trainer.engine_state import OptimizerView


class EngineStep(NamedTuple):
    """What one optimizer step did, alike on every rank."""

    applied: bool
    grad_norm: Tensor | float
    """Norm of the global gradient before clipping; infinite or NaN if the step was skipped."""


class Engine:
    """One model and its AdamW under DeepSpeed."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: EngineConfig,
        *,
        micro_batch_size: int,
        clip_norm: float,
    ) -> None:
        self.config = config
        self._clip_norm = clip_norm
        self._optimizer = optimizer
        table = config.deepspeed_dict(
            micro_batch_size=micro_batch_size,
            clip_norm=clip_norm,
            zero_table=zero_table(config, sum(p.numel() for p in model.parameters()), ranks.world_size()),
        )
        if config.expert_parallel_size > 1:
            self._engine, group = deepspeed_door.initialize_with_experts(
                model, optimizer, table, config.expert_parallel_size
            )
            self.module.join_expert_group(group)  # type: ignore[operator]
        else:
            self._engine = deepspeed_door.initialize(model, optimizer, table)
        if config.sequence_parallel_size > 1:
            self.module.join_sequence_group(  # type: ignore[operator]
                _consecutive_ranks(config.sequence_parallel_size, dist.group.WORLD)
            )
        self._reduces = config.zero_stage > 0 or ranks.world_size() > 1
        # One rank has the whole gradient: DeepSpeed would copy it together, send it to nobody and copy it back.
        self._engine.enable_backward_allreduce = self._reduces
        self.state = OptimizerView(self.module, self._engine.optimizer, config.zero_stage)
        self.state.forget_first_step()

    @property
    def module(self) -> nn.Module:
        """The bare model on its device, in its precision."""
        module: nn.Module = self._engine.module
        return module

    def forward(
        self, tokens_BT: Tensor, labels_BT: Tensor, documents_BT: Tensor
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy of every target token, float32 [B, T], and what else the model returns in training."""
        output: Tensor | tuple[Tensor, Tensor, Tensor] = self._engine(tokens_BT, labels_BT, documents_BT)
        return output

    def backward(self, objective: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of a scalar that is this rank's share of the globally normalised objective.

        `last`: the final backward of the optimizer step, after which gradients are reduced over ranks.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over ranks, while our shares add up to the objective: also those of a sequence group, whose
        # ranks know the same objective but send its gradient through their own tokens only.
        self._engine.backward(objective * ranks.world_size(), scale_wrt_gas=False)
        if last and not self._reduces:
            self._complete_gradients()

    def _complete_gradients(self) -> None:
        """Zeros for parameters that had no part in the loss, as reduction leaves them: Adam decays these too."""
        for parameter in self.module.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def step(self, learning_rate: float, gradient_scale: Tensor | None = None) -> EngineStep:
        """Clip and update, or skip if the gradient is not finite: then parameters and optimizer are untouched.

        `gradient_scale`: factor the accumulated gradient still lacks; it is applied before norm and clipping.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        if not self.config.checks_gradients_itself:
            with self._scaled_gradients(gradient_scale):
                self._engine.step()
            applied = self._engine.was_step_applied()
            if not applied and self.config.offload_optimizer:
                self._forget_offloaded_gradients()
            grad_norm = self._engine.get_global_grad_norm()
            if gradient_scale is not None and applied and not self._norm_is_unscaled:
                grad_norm = grad_norm * gradient_scale
            return EngineStep(applied, grad_norm)
        if gradient_scale is not None:
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, gradient_scale.to(gradients[0].dtype))
        grad_norm = nn.utils.clip_grad_norm_(self.module.parameters(), self._clip_norm or math.inf)
        # Reduced gradients are the same on every rank; the flag is agreed all the same, for memory can err on one.
        is_bad = ranks.all_reduce_((~torch.isfinite(grad_norm)).to(torch.int32), "max")
        if bool(is_bad):
            self._engine.zero_grad()
            return EngineStep(False, grad_norm)
        self._engine.step()
        return EngineStep(True, grad_norm)

    @contextmanager
    def _scaled_gradients(self, scale: Tensor | None) -> Iterator[None]:
        """Let DeepSpeed's optimizer multiply its reduced gradients by `scale` on the way to norm and clipping.

        That is what its loss scale is for: a gradient accumulated with scale 1 is divided by the scale of this moment.
        BF16_Optimizer (bf16 at stage 1 with fp32 accumulation) has none, but keeps its gradients in flat buffers.
        """
        optimizer = self._engine.optimizer
        if scale is None:
            yield
            return
        buffers = getattr(optimizer, "fp32_groups_gradients_flat", None)
        if buffers is not None:
            torch._foreach_mul_(list(buffers), scale.to(buffers[0].dtype))
            yield
            return
        owner = optimizer.loss_scaler if hasattr(optimizer, "loss_scaler") else optimizer.loss_scale_config
        before, owner.cur_scale = owner.cur_scale, (1 / scale).float()
        try:
            yield
        finally:
            owner.cur_scale = before

    def _forget_offloaded_gradients(self) -> None:
        """Clear what DeepSpeed 0.19 leaves behind when it skips a step with offload at stages 1 and 2.

        The float32 buffer that bf16 gradients are added up in keeps its NaN, and every later step would be skipped too.
        """
        leftover: dict[int, Any] = getattr(self._engine.optimizer, "averaged_gradients", {})
        for group in leftover:
            leftover[group] = None

    @property
    def _norm_is_unscaled(self) -> bool:
        """Whether DeepSpeed reports the norm of the gradient after the scale; bf16 at stage 0 reports it before."""
        return not hasattr(self._engine.optimizer, "loss_scale_config")

    def seams(self) -> Iterator[tuple[str, Any, str]]:
        """(phase, object, name of its method): where DeepSpeed reduces, clips and steps, for a breakdown of time."""
        optimizer = self._engine.optimizer
        yield "backward/reduce", self._engine, "_backward_epilogue"
        for phase, owner, method in (
            ("backward/reduce", optimizer, "reduce_ipg_grads"),  # stages 1 and 2, between the gradients
            ("backward/reduce", optimizer, "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads"),
            ("optimizer/clip", self._engine, "clip_fp32_gradients"),
            ("optimizer/clip", optimizer, "scaled_global_norm"),
            ("optimizer/clip", optimizer, "unscale_and_clip_grads"),
            ("optimizer/clip", optimizer, "check_overflow"),
            ("optimizer/adam", self.state.adam, "step"),
        ):
            if hasattr(owner, method):
                yield phase, owner, method

    def abandon(self, loss: Tensor) -> None:
        """Drop the gradients that earlier backwards of this step have left, on every rank.

        A last backward that is not finite sends them all down DeepSpeed's own path for overflow, which clears
        every buffer it keeps; `loss` is any scalar that has not been through a backward yet.
        """
        self.backward(loss * torch.nan, last=True)
        applied, _ = self.step(0.0)
        assert not applied

    @contextmanager
    def whole(self, parameter: nn.Parameter, *, write: bool = False) -> Iterator[None]:
        """Have all of a parameter, which is cut into parts at stage 3; `write`: keep what is written into it.

        A collective at stage 3: every rank enters it.
        """
        if self.config.zero_stage < 3:
            yield
            return
        with deepspeed_door.gathered(parameter, write=write):
            yield


@cache
def _consecutive_ranks(size: int, world: dist.ProcessGroup) -> dist.ProcessGroup:
    """The group of `size` consecutive ranks of `world` that this one is in. A collective: every rank makes every group.

    Made once: DeepSpeed keeps its own for the life of a process too, and each group has threads.
    """
    firsts = range(0, dist.get_world_size(), size)
    groups = [dist.new_group(list(range(first, first + size))) for first in firsts]
    return groups[dist.get_rank() // size]
