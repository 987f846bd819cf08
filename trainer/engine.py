"""The DeepSpeed engine behind five verbs: forward, backward, step, save, load.

Decisions:
- DeepSpeed sees a gradient accumulation of one; we tell it which backward is the last of a step. It never
  scales the loss: objectives arrive normalised over the global batch, and the factor W here only undoes
  its averaging over ranks.
- The DeepSpeed dict is generated from `EngineConfig`, because unknown top-level keys in it are ignored silently.
- Learning rate: set by us before each step, so that a skipped step cannot advance a scheduler.
- A step whose gradients are not finite changes nothing. DeepSpeed 0.19 checks that itself except for fp32 at
  stage 0, where it would apply NaN; there the norm, the check and the clipping are ours.
- This is the only module that imports deepspeed, and it does so late: configs and --help stay fast.
"""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from trainer import ranks
from trainer.errors import CheckpointError

_CHECKPOINT_TAG = "engine"
_MARKER = "expert_groups"
_OWNED_ZERO_KEYS = {"stage", "reduce_bucket_size", "allgather_bucket_size", "offload_param", "offload_optimizer"}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How DeepSpeed runs the model."""

    zero_stage: int = 1
    """ZeRO stage: 0 (nothing sharded), 1 (optimizer state) or 2 (and gradients)."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Type of parameters and activations. bf16 keeps fp32 master weights in the optimizer."""
    grad_accumulation: Literal["auto", "fp32", "bf16"] = "auto"
    """Type gradients accumulate in over micro-batches; auto is fp32 wherever DeepSpeed can (not bf16 at stage 0)."""
    expert_parallel_size: int = 1
    """Ranks that share one copy of the experts; consecutive ranks form a group."""
    bucket_elements: int = 50_000_000
    """Gradient elements reduced, and parameter elements gathered, in one collective."""
    collective_timeout_s: float = 600.0
    """Seconds a collective waits for a silent rank before the run ends with exit code 5."""
    zero_options: dict[str, Any] = field(default_factory=dict)
    """Further keys of DeepSpeed's `zero_optimization` table, checked by DeepSpeed's own schema."""

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        found = []
        if self.zero_stage == 3:
            found.append("zero_stage: 3 is not supported yet; use 0, 1 or 2")
        elif self.zero_stage not in (0, 1, 2):
            found.append(f"zero_stage: {self.zero_stage} does not exist; use 0, 1 or 2")
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
                "by a norm that differs between ranks"
            )
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
            "zero_optimization": {
                "stage": self.zero_stage,
                "reduce_bucket_size": self.bucket_elements,
                "allgather_bucket_size": self.bucket_elements,
                **self.zero_options,
            },
            "steps_per_print": None,
        }

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
        # DeepSpeed averages over ranks, while our shares add up to the objective.
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

    @property
    def _norm_is_unscaled(self) -> bool:
        """Whether DeepSpeed reports the norm of the gradient after the scale; bf16 at stage 0 reports it before."""
        return not hasattr(self._engine.optimizer, "loss_scale_config")

    def abandon(self, loss: Tensor) -> None:
        """Drop the gradients that earlier backwards of this step have left, on every rank.

        A last backward that is not finite sends them all down DeepSpeed's own path for overflow, which clears
        every buffer it keeps; `loss` is any scalar that has not been through a backward yet.
        """
        self.backward(loss * torch.nan, last=True)
        applied, _ = self.step(0.0)
        assert not applied

    def save(self, folder: Path) -> None:
        """Write model and optimizer under `folder`; every rank calls it. Atomicity is the caller's business.

        Sharded experts are whole in the optimizer's shards only: the caller saves their weights.
        """
        with self._as_dense():
            self._engine.save_checkpoint(str(folder), tag=_CHECKPOINT_TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. DeepSpeed unpickles: verify the files' hashes before calling this."""
        with self._as_dense():
            loaded, _ = self._engine.load_checkpoint(str(folder), tag=_CHECKPOINT_TAG)
        if loaded is None:
            raise CheckpointError(f"{folder}: DeepSpeed found nothing to load; remove it to use an older checkpoint")

    @contextmanager
    def _as_dense(self) -> Iterator[None]:
        """Let DeepSpeed save and load as if no expert were sharded: its own way wants one module for each expert."""
        had_moe_layers = self._engine.has_moe_layers
        self._engine.has_moe_layers = False
        try:
            yield
        finally:
            self._engine.has_moe_layers = had_moe_layers


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
