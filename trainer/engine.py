"""The DeepSpeed engine behind three verbs, forward, backward and step, and a view of what its optimizer holds.

Decisions:
- DeepSpeed sees a gradient accumulation of one; we tell it which backward is the last of a step. It never
  scales the loss: objectives arrive normalised over the global batch, and the factor W here only undoes
  its averaging over ranks.
- The DeepSpeed dict is generated from `EngineConfig`, because unknown top-level keys in it are ignored silently.
- Learning rate: set by us before each step, so that a skipped step cannot advance a scheduler.
- A step whose gradients are not finite changes nothing. DeepSpeed 0.19 checks that itself except for fp32 at
  stage 0, where it would apply NaN; there the norm, the check and the clipping are ours.
- DeepSpeed's own checkpoints are not used: they are pickled, tied to the number of ranks and do not know shared expert
  stacks. `fragments` shows the optimizer's numbers where they lie, and trainer/optimizer_state.py writes them.
- This is the only module that imports deepspeed, and it does so late: configs and --help stay fast.
"""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer import ranks
from trainer.model_weights import expert_group
from trainer.optimizer_state import Fragment

_MARKER = "expert_groups"
_OWNED_ZERO_KEYS = {"stage", "reduce_bucket_size", "allgather_bucket_size", "offload_param", "offload_optimizer"}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How DeepSpeed runs the model."""

    zero_stage: int = 1
    """ZeRO stage: 0 (nothing sharded), 1 (optimizer state), 2 (and gradients) or 3 (and parameters)."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Type of parameters and activations. bf16 keeps fp32 master weights in the optimizer."""
    grad_accumulation: Literal["auto", "fp32", "bf16"] = "auto"
    """Type gradients accumulate in over micro-batches; auto is fp32 wherever DeepSpeed can (not bf16 at stage 0)."""
    expert_parallel_size: int = 1
    """Ranks that share one copy of the experts; consecutive ranks form a group."""
    sequence_parallel_size: int = 1
    """Ranks that share the tokens of a row (Ulysses); consecutive ranks form a group."""
    offload_optimizer: bool = False
    """Keep master weights and Adam's moments in the host's memory, and step there."""
    bucket_elements: int = 50_000_000
    """Gradient elements reduced, and parameter elements gathered, in one collective."""
    collective_timeout_s: float = 600.0
    """Seconds a collective waits for a silent rank before the run ends with exit code 5."""
    zero_options: dict[str, Any] = field(default_factory=dict)
    """Further keys of DeepSpeed's `zero_optimization` table, checked by DeepSpeed's own schema."""

    def data_parallel(self, place: int) -> int:
        """Of a rank or of a number of ranks: which, or how many, of those that get samples of their own."""
        return place // self.sequence_parallel_size

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        found = []
        if self.zero_stage not in (0, 1, 2, 3):
            found.append(f"zero_stage: {self.zero_stage} does not exist; use 0, 1, 2 or 3")
        if self.precision == "fp32" and self.grad_accumulation == "bf16":
            found.append("grad_accumulation: bf16 with precision fp32 would lose what fp32 keeps; use auto")
        if self.precision == "bf16" and self.zero_stage == 0 and self.grad_accumulation == "fp32":
            found.append(
                "grad_accumulation: DeepSpeed cannot accumulate in fp32 with bf16 at zero_stage 0; use stage 1"
            )
        if self.expert_parallel_size < 1:
            found.append(f"expert_parallel_size: {self.expert_parallel_size} must be at least 1")
        if self.expert_parallel_size > 1 and self.zero_stage not in (1, 2):
            found.append(
                f"expert_parallel_size: {self.expert_parallel_size} needs zero_stage 1 or 2; at 0 DeepSpeed clips "
                "by a norm that differs between ranks, at 3 it has no expert groups"
            )
        if self.sequence_parallel_size < 1:
            found.append(f"sequence_parallel_size: {self.sequence_parallel_size} must be at least 1")
        if self.offload_optimizer and self.zero_stage == 0:
            found.append("offload_optimizer: DeepSpeed has no offload at zero_stage 0; use stage 1, 2 or 3")
        if self.bucket_elements < 1:
            found.append(f"bucket_elements: {self.bucket_elements} must be at least 1")
        if not (math.isfinite(self.collective_timeout_s) and self.collective_timeout_s > 0):
            found.append(f"collective_timeout_s: {self.collective_timeout_s} must be a positive number of seconds")
        if self.zero_options:
            found += self._zero_option_problems()
        return found

    def _zero_option_problems(self) -> list[str]:
        owned = sorted(_OWNED_ZERO_KEYS & self.zero_options.keys())
        if owned:
            return [f"zero_options.{key}: is set by another field of engine; remove it" for key in owned]
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
        from pydantic import ValidationError

        try:
            DeepSpeedZeroConfig(**self.zero_options)
        except ValidationError as error:
            return [f"zero_options.{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        return []

    @property
    def accumulation_dtype(self) -> str:
        """The type gradients really accumulate in."""
        if self.grad_accumulation != "auto":
            return self.grad_accumulation
        return "bf16" if self.precision == "bf16" and self.zero_stage == 0 else "fp32"

    def deepspeed_dict(self, *, micro_batch_size: int, clip_norm: float) -> dict[str, Any]:
        """The configuration DeepSpeed is given, complete."""
        return {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0 if self.checks_gradients_itself else clip_norm,
            "bf16": {"enabled": self.precision == "bf16", "check_grad_overflow": True},
            "data_types": {"grad_accum_dtype": self.accumulation_dtype},
            "zero_allow_untested_optimizer": True,
            # torch's fused AdamW has a vectorised kernel for host tensors: the same numbers, and nothing to compile.
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                "stage": self.zero_stage,
                "reduce_bucket_size": self.bucket_elements,
                "allgather_bucket_size": self.bucket_elements,
                **self._offload_table,
                **self.zero_options,
            },
            "steps_per_print": None,
        }

    @property
    def _offload_table(self) -> dict[str, Any]:
        if not self.offload_optimizer:
            return {}
        # Memory can be pinned only where there is a device to copy it to.
        return {"offload_optimizer": {"device": "cpu", "pin_memory": ranks.device().type == "cuda"}}

    @property
    def keeps_graphs(self) -> bool:
        """Whether a graph may wait while others are made: at stage 3 DeepSpeed frees parameters under its feet, and
        gradients would be silently wrong."""
        return self.zero_stage < 3

    @property
    def checks_gradients_itself(self) -> bool:
        """True where DeepSpeed would apply a non-finite gradient, so that norm, check and clipping are ours."""
        return self.precision == "fp32" and self.zero_stage == 0


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
        import deepspeed

        self.config = config
        self._clip_norm = clip_norm
        self._optimizer = optimizer
        sharded = config.expert_parallel_size > 1
        if sharded:
            model.add_module(_MARKER, _expert_group_marker(config.expert_parallel_size))
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=config.deepspeed_dict(micro_batch_size=micro_batch_size, clip_norm=clip_norm),
            dist_init_required=False,
        )
        if sharded:
            from deepspeed.utils import groups

            del model._modules[_MARKER]  # its work is done, and its name must not get into checkpoints
            self.module.join_expert_group(groups._get_expert_parallel_group(f"ep_size_{config.expert_parallel_size}"))  # type: ignore[operator]
        if config.sequence_parallel_size > 1:
            self.module.join_sequence_group(  # type: ignore[operator]
                _consecutive_ranks(config.sequence_parallel_size, dist.group.WORLD)
            )
        self._forget_first_step()

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
            ("optimizer/adam", self._adam, "step"),
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

    def fragments(self) -> Iterator[Fragment]:
        """What this rank's optimizer holds, as views: reading them saves it, writing into them restores it.

        At stage 0 every rank holds everything, above it every element is held once.
        """
        masters = self._whole_masters()
        for name, parameter in self.module.named_parameters():
            size, offset = self._place_in_model(name, parameter)
            if masters is not None:
                master = masters[parameter]
                state = _adam_state(self._adam, master)
                values = [tensor.view(-1) for tensor in (master.detach(), state["exp_avg"], state["exp_avg_sq"])]
                yield Fragment(name, size, offset, *values)
                continue
            if self.config.zero_stage == 3:
                yield self._partition(name, parameter)
                continue
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:  # another rank has it
                continue
            flat = self._adam.param_groups[mapping.param_group_index]["params"][0]
            state, address = _adam_state(self._adam, flat), mapping.hp_fragment_address
            values = [
                tensor.narrow(0, address.start, address.numel)
                for tensor in (flat.detach(), state["exp_avg"], state["exp_avg_sq"])
            ]
            yield Fragment(name, size, offset + mapping.lp_fragment_address.start, *values)

    def _partition(self, name: str, parameter: nn.Parameter) -> Fragment:
        """This rank's part of a parameter at stage 3, where all are cut into equal parts, the last one padded."""
        optimizer: Any = self._engine.optimizer
        group, begin, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        flat, size = optimizer.fp32_partitioned_groups_flat[group], parameter.ds_numel  # type: ignore[attr-defined]
        state = _adam_state(self._adam, flat)
        start = min(length * ranks.rank(), size)
        values = [
            tensor.narrow(0, begin, min(length, size - start))
            for tensor in (flat.detach(), state["exp_avg"], state["exp_avg_sq"])
        ]
        return Fragment(name, size, start, *values)

    @contextmanager
    def whole(self, parameter: nn.Parameter, *, write: bool = False) -> Iterator[None]:
        """Have all of a parameter, which is cut into parts at stage 3; `write`: keep what is written into it.

        A collective at stage 3: every rank enters it.
        """
        if self.config.zero_stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if write else None):
            yield

    def parameter_sizes(self) -> dict[str, int]:
        """Elements of every parameter of the whole model."""
        return {name: self._place_in_model(name, parameter)[0] for name, parameter in self.module.named_parameters()}

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
    def _adam(self) -> torch.optim.Optimizer:
        """The optimizer that DeepSpeed has wrapped, if it has."""
        adam: torch.optim.Optimizer = getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)
        return adam

    def _adam_states(self) -> list[dict[str, Tensor]]:
        return [state for state in self._adam.state.values() if state]

    def _whole_masters(self) -> dict[nn.Parameter, Tensor] | None:
        """The tensor Adam steps for each parameter, where that is a whole one; None if the engine has cut them."""
        if self.config.zero_stage:
            return None
        optimizer = self._engine.optimizer
        if not hasattr(optimizer, "fp32_groups"):
            return {parameter: parameter for parameter in self.module.parameters()}
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        return {low: master for lows, masters in pairs for low, master in zip(lows, masters, strict=True)}

    def _place_in_model(self, name: str, parameter: nn.Parameter) -> tuple[int, int]:
        """Elements of the whole parameter, and where this rank's begin: experts are shares of one stack."""
        group = expert_group(self.module, name)
        if group is None:
            return getattr(parameter, "ds_numel", parameter.numel()), 0
        return parameter.numel() * dist.get_world_size(group), parameter.numel() * dist.get_rank(group)

    def _forget_first_step(self) -> None:
        """Undo the step on zero gradients with which DeepSpeed's bf16 optimizer of stage 0 makes room for its state.

        It has decayed the weights once, and Adam's corrections would be one step ahead for the whole run.
        """
        if hasattr(self._engine.optimizer, "fp32_groups"):
            for parameter, master in (self._whole_masters() or {}).items():
                master.detach().copy_(parameter.detach())
            self.clock = 0.0


def _adam_state(adam: torch.optim.Optimizer, tensor: Tensor) -> dict[str, Tensor]:
    """Adam's state of a tensor; zeros, as before its first step, if it has none yet."""
    state: dict[str, Tensor] = adam.state[tensor]
    if not state:
        on_device = adam.defaults.get("fused") or adam.defaults.get("capturable")
        state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device if on_device else "cpu")
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(tensor), torch.zeros_like(tensor)
    return state


@cache
def _consecutive_ranks(size: int, world: dist.ProcessGroup) -> dist.ProcessGroup:
    """The group of `size` consecutive ranks of `world` that this one is in. A collective: every rank makes every group.

    Made once: DeepSpeed keeps its own for the life of a process too, and each group has threads.
    """
    firsts = range(0, dist.get_world_size(), size)
    groups = [dist.new_group(list(range(first, first + size))) for first in firsts]
    return groups[dist.get_rank() // size]


def _expert_group_marker(size: int) -> nn.Module:
    """An empty module by which DeepSpeed learns that there are expert groups: it looks for subclasses of its MoE."""
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    class ExpertGroups(MoE):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.expert_group_name = f"ep_size_{size}"
            self.num_experts = self.ep_size = size
            self.num_local_experts = 1

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            if self.expert_group_name not in groups._get_expert_parallel_group_dict():
                groups._create_expert_and_data_parallel(size, use_data_before_expert_parallel_=False)

    return ExpertGroups()


def adopt_process_group() -> None:
    """Let DeepSpeed use the process group that exists; builds its CPU extension on the first call ever."""
    logging.getLogger("DeepSpeed").setLevel(os.environ.get("DEEPSPEED_LOG_LEVEL", "WARNING").upper())
    import deepspeed

    deepspeed.init_distributed(dist_backend="nccl" if ranks.device().type == "cuda" else "gloo")
