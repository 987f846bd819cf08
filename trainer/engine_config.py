"""How DeepSpeed runs the model: the settings, what contradicts what, and the dictionary DeepSpeed is given.

The dictionary is generated from `EngineConfig`, because DeepSpeed ignores unknown top-level keys in it silently. What
is left open here is chosen in trainer/engine_choices.py.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from trainer import deepspeed_door, ranks

_YEAR_S = 366 * 24 * 3600
_REFUSED_ZERO_KEYS = {
    **dict.fromkeys(
        ("stage", "reduce_bucket_size", "offload_optimizer"), "is set by another field of engine; remove it"
    ),
    # DeepSpeed's old names: an offload that we do not know of would keep a bad gradient and skip every later step.
    **dict.fromkeys(
        ("cpu_offload", "cpu_offload_use_pin_memory"), "is set by engine.offload_optimizer; use that instead"
    ),
    **dict.fromkeys(
        ("offload_param", "cpu_offload_param"), "offload of parameters is not supported; use engine.offload_optimizer"
    ),
    "compute_grad_norm": "must stay true, for clipping and the metric grad_norm need the norm; remove it",
    "zenflow": "would step a part of the weights later than the step it belongs to; remove it",
    "legacy_stage1": "is of a DeepSpeed that is no more; remove it",
    "allgather_bucket_size": "has no effect: torch gathers a group of parameters in one collective; remove it",
    "save_muon_momentum_buffer_in_memory": "has no effect: the optimizer is AdamW; remove it",
    **dict.fromkeys(
        (
            "load_from_fp32_weights",
            "elastic_checkpoint",
            "pipeline_loading_checkpoint",
            "gather_16bit_weights_on_model_save",
            "stage3_gather_16bit_weights_on_model_save",
            "stage3_gather_fp16_weights_on_model_save",
        ),
        "has no effect: checkpoints are not DeepSpeed's; remove it",
    ),
}
_ROUND_ROBIN = (
    "zero_options.round_robin_gradients: DeepSpeed would deal parameters to ranks in another order than it says, and a "
    "checkpoint would hold Adam's numbers under wrong names; remove it"
)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How DeepSpeed runs the model."""

    zero_stage: int = 1
    """ZeRO stage: 0 (nothing sharded), 1 (optimizer state), 2 (and gradients) or 3 (and parameters)."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Type of parameters and activations. bf16 keeps fp32 master weights in the optimizer."""
    grad_accumulation: Literal["auto", "fp32", "bf16"] = "auto"
    """Type gradients accumulate in over micro-batches; auto is fp32 wherever DeepSpeed can (not bf16 at stage 0)."""
    reduce_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Type gradients are added up over ranks in; auto is the one they accumulate in, so that nothing is rounded on the
    way. bf16 sends half the bytes of fp32, and a gradient is off by some 0.2 %, more with more ranks."""
    expert_parallel_size: int = 1
    """Ranks that share one copy of the experts; consecutive ranks form a group."""
    sequence_parallel_size: int = 1
    """Ranks that share the tokens of a row (Ulysses); consecutive ranks form a group."""
    offload_optimizer: bool = False
    """Keep master weights and Adam's moments in the host's memory, and step there."""
    bucket_elements: int = 0
    """Gradient elements reduced in one collective; 0 chooses by the model and the number of ranks, and
    `launch.dryrun` says what and why."""
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
        if self.precision == "fp32" and self.reduce_dtype == "bf16":
            found.append("reduce_dtype: bf16 with precision fp32 would lose what fp32 keeps; use auto")
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
        if self.bucket_elements < 0:
            found.append(f"bucket_elements: {self.bucket_elements} is negative; use 0 to have it chosen")
        if not 0 < self.collective_timeout_s <= _YEAR_S:
            found.append(
                f"collective_timeout_s: {self.collective_timeout_s} must be a positive number of seconds, at most "
                f"{_YEAR_S} (a year)"
            )
        if self.zero_options and self.zero_stage in (0, 1, 2, 3):
            found += self._zero_option_problems()
        return found

    def _zero_option_problems(self) -> list[str]:
        refused = sorted(_REFUSED_ZERO_KEYS.keys() & self.zero_options.keys())
        if refused:
            return [f"zero_options.{key}: {_REFUSED_ZERO_KEYS[key]}" for key in refused]
        options, found = deepspeed_door.read_zero_options(self.zero_options, stage=self.zero_stage)
        if options.get("round_robin_gradients"):
            found.append(_ROUND_ROBIN)
        if self.expert_parallel_size > 1:
            found += [
                f"zero_options.{key}: with expert_parallel_size above 1 DeepSpeed would reduce experts over ranks that "
                "hold others; remove it"
                for key in ("contiguous_gradients", "reduce_scatter")
                if options.get(key) is False
            ]
        return found

    @property
    def accumulation_dtype(self) -> str:
        """The type gradients really accumulate in."""
        if self.grad_accumulation != "auto":
            return self.grad_accumulation
        return "bf16" if self.precision == "bf16" and self.zero_stage == 0 else "fp32"

    @property
    def reduction_dtype(self) -> str:
        """The type gradients are really added up over ranks in."""
        return self.accumulation_dtype if self.reduce_dtype == "auto" else self.reduce_dtype

    @property
    def reduces_flat_buffers(self) -> bool:
        """Whether DeepSpeed's bf16 optimizer is at work, which keeps all gradients in flat float32 buffers."""
        return (
            self.precision == "bf16"
            and self.zero_stage == 1
            and self.accumulation_dtype == "fp32"
            and not self.offload_optimizer
        )

    def deepspeed_dict(self, *, micro_batch_size: int, clip_norm: float, zero_table: dict[str, Any]) -> dict[str, Any]:
        """The configuration DeepSpeed is given, complete; `zero_table` is that of trainer/engine_choices.py."""
        return {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0 if self.checks_gradients_itself else clip_norm,
            "bf16": {"enabled": self.precision == "bf16", "check_grad_overflow": True},
            "data_types": {"grad_accum_dtype": self.accumulation_dtype},
            "communication_data_type": self.reduction_dtype,
            "zero_allow_untested_optimizer": True,
            # torch's fused AdamW has a vectorised kernel for host tensors: the same numbers, and nothing to compile.
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero_table,
            "steps_per_print": None,
            # It would wait for the device at the start of every forward and the end of every step.
            "timers": {"throughput": {"enabled": False}},
        }

    @property
    def offload_table(self) -> dict[str, Any]:
        """The part of DeepSpeed's `zero_optimization` table about offload."""
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
