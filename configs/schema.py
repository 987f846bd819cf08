"""The run configuration: one dataclass per owner, nested, and the checks that need more than one of them."""

import re
from dataclasses import dataclass, field
from typing import Any

from moe.config import ModelConfig
from trainer.checkpoint import CheckpointConfig
from trainer.data.config import DataConfig
from trainer.engine_config import EngineConfig
from trainer.evaluate import EvaluationConfig
from trainer.health import HealthConfig
from trainer.loop import TrainConfig
from trainer.optim import OptimizerConfig
from trainer.profiling import ProfileConfig
from trainer.schedule import ScheduleConfig
from trainer.wandb_sink import WandbConfig

SECTIONS = (
    "model", "data", "train", "optimizer", "schedule", "engine", "evaluation", "checkpoint", "health", "wandb",
    "profile",
)  # fmt: skip

_MAX_NAME_BYTES = 200  # file systems take 255, and we put something before or after it


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run depends on besides the machine."""

    name: str = "run"
    """Name of the run, and of its folder under runs/ unless run_dir is set."""
    run_dir: str = ""
    """Folder of the run; empty means runs/<name>. Starting again with the same folder resumes."""
    seed: int = 0
    """Seed of initial weights, dropout and sample order."""
    init_from: str = ""
    """Folder of initial weights (`launch.from_hf` writes one, a checkpoint is one); empty draws them.
    Read only while the run folder has no checkpoint."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    hooks: dict[str, Any] = field(default_factory=dict)
    """Hooks by label: `{hook: name or package.module:Class (default: the label), enabled: bool, ...its options}`."""

    @property
    def folder(self) -> str:
        """The run folder."""
        return self.run_dir or f"runs/{self.name}"

    def problems(self, world_size: int | None) -> list[str]:
        """Every inconsistency of the run on `world_size` ranks, or on any, each line beginning with the full key."""
        found = [f"{section}.{line}" for section in SECTIONS for line in getattr(self, section).problems()]
        if world_size is not None:  # what was trained long ago can still be looked at
            found += [f"model.{line}" for line in self.model.training_problems()]
        found += folder_name_problems(self.name)
        if not 0 <= self.seed < 2**32:
            found.append(f"seed: {self.seed} must be in [0, 2^32)")
        sharing = self._sequence_problems(world_size)
        found += sharing
        if world_size is not None and not sharing and self.engine.sequence_parallel_size > 0:
            found += [f"train.{line}" for line in self.train.batch_problems(self.engine.data_parallel(world_size))]
        if not found:
            batch = {"steps": self.train.steps, "global_batch_size": self.train.global_batch_size}
            found += [f"data.{line}" for line in self.data.phase_problems(**batch)]
        if self.data.packing == "best_fit" and not self.model.document_mask:
            found.append(
                "data.packing: best_fit puts unrelated documents side by side; set model.document_mask to true with it"
            )
        shares = self.engine.expert_parallel_size
        for experts in sorted(set(self.model.block_experts)):
            if shares > 1 and experts % shares:
                where = "an entry of model.layer_experts" if self.model.layer_experts else "model.num_experts"
                found.append(f"engine.expert_parallel_size: {shares} does not divide {where} ({experts})")
        if shares > 1 and world_size is not None and world_size % shares:
            found.append(f"engine.expert_parallel_size: {shares} does not divide the number of ranks ({world_size})")
        if shares > 1 and self.model.num_moe_layers < 1:
            found.append(f"engine.expert_parallel_size: {shares}, but the model has no experts; set it to 1")
        if self.train.accumulation in ("deferred", "frozen") and not self.engine.keeps_graphs:
            found.append(
                f"train.accumulation: {self.train.accumulation} keeps graphs, which DeepSpeed would spoil at "
                "engine.zero_stage 3; use auto or two_pass"
            )
        if self.model.compile:
            found += self._compile_problems()
        if self.train.spikes.policy == "rewind":
            spikes, reach = self.train.spikes, (self.checkpoint.keep - 1) * self.checkpoint.every
            if self.checkpoint.every == 0:
                found.append("train.spikes.policy: rewind needs checkpoints to go back to; set checkpoint.every")
            elif reach < spikes.reach:
                found.append(
                    f"train.spikes.rewind_steps: {spikes.rewind_steps} steps before {spikes.patience} spikes in a row "
                    f"there may be no checkpoint left: checkpoint.keep - 1 times checkpoint.every is {reach}, rewind_"
                    f"steps + patience - 2 is {spikes.reach}; raise one of the former"
                )
        if self.train.accumulation == "frozen" and (self.model.aux_loss.any or self.model.has_mtp):
            found.append(
                "train.accumulation: frozen scales the whole gradient by the weights' divisor, so it cannot be used "
                "with model.aux_loss or model.mtp_weight; use auto"
            )
        found += [
            f"profile.{line}" for line in self.profile.run_problems(steps=self.train.steps, world_size=world_size)
        ]
        found += [f"schedule.{line}" for line in self.schedule.step_problems(self.train.steps)]
        return found

    def _compile_problems(self) -> list[str]:
        """What compiled regions cannot go with."""
        found = []
        if self.engine.zero_stage == 3:
            found.append("engine.zero_stage 3, which takes parameters out of the regions and puts them back")
        if self.engine.sequence_parallel_size > 1:
            found.append(
                f"engine.sequence_parallel_size ({self.engine.sequence_parallel_size}), whose exchanges lie inside"
            )
        if self.profile.breakdown:
            found.append("profile.breakdown, which would have to look inside")
        return [f"model.compile: cannot be used with {line}; set it to false" for line in found]

    def _sequence_problems(self, world_size: int | None) -> list[str]:
        """Why rows cannot be spread over engine.sequence_parallel_size ranks; empty if they can, or are not."""
        size, model = self.engine.sequence_parallel_size, self.model
        if size <= 1:
            return []
        found = []
        if world_size is not None and world_size % size:
            found.append(f"{size} does not divide the number of ranks ({world_size})")
        if self.train.sequence_length % size:
            found.append(f"{size} does not divide train.sequence_length ({self.train.sequence_length})")
        if model.num_heads % size:
            found.append(f"{size} does not divide model.num_heads ({model.num_heads}); attention is cut by heads")
        elif model.num_kv_heads % size and size % model.num_kv_heads:
            found.append(f"{size} neither divides nor is a multiple of model.num_kv_heads ({model.num_kv_heads})")
        if model.capacity_factor:
            found.append(
                f"{size} with model.capacity_factor ({model.capacity_factor}): an expert's capacity is that of a "
                "micro-batch, of which no rank would see all tokens; set one of them to its default"
            )
        return [f"engine.sequence_parallel_size: {line}" for line in found]


def folder_name_problems(name: str) -> list[str]:
    """Why a run or a grid cannot be called so; empty if it can."""
    if re.fullmatch(r"\w[\w.+-]*", name) and len(name.encode()) <= _MAX_NAME_BYTES:
        return []
    what = "letters, digits, '.', '+', '-' and '_'"
    return [f"name: {name[:80]!r} cannot name a folder; use {what}, up to {_MAX_NAME_BYTES} bytes"]
