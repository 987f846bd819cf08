"""Whole optimizer steps on any device: ours, through real engine and accumulation, and transformers' under DeepSpeed.

One GLM-4-MoE in both, with the same weights, batches, ZeRO stage, fused AdamW and clipping.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe.config import ModelConfig
from moe.model import MoEDecoder
from tests.moe.test_bias_hook import APPLIED, Records
from trainer.accumulate import AccumulatedStep, AccumulationMode, Accumulator
from trainer.data.loader import MicroBatch
from trainer.engine import Engine, EngineConfig
from trainer.hooks import Hook, HookList, RunContext
from trainer.optim import OptimizerConfig, build_adamw


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What one optimizer step of one process is of."""

    model: ModelConfig
    """Of the kind GLM-4-MoE is: sigmoid scores, normalised gates, norms on query and key, no biases."""
    vocab_size: int
    sequence: int
    micro_batch: int
    micro_batches: int
    engine: EngineConfig
    device: torch.device
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-4))

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.sequence * self.micro_batch * self.micro_batches

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and activations."""
        return torch.bfloat16 if self.engine.precision == "bf16" else torch.float32

    def with_layers(self, num_layers: int) -> "StepShape":
        """The same with another number of blocks."""
        return replace(self, model=replace(self.model, num_layers=num_layers))

    def batches(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step, the same for everybody; in host memory, pinned for a GPU."""
        generator = torch.Generator().manual_seed(step)
        found = []
        for m in range(self.micro_batches):
            size = (self.micro_batch, self.sequence + 1)
            tokens_bT = torch.randint(0, self.vocab_size, size, generator=generator)
            ids_b = torch.arange(self.micro_batch) + self.micro_batch * (m + self.micro_batches * step)
            zeros_b = torch.zeros_like(ids_b)
            batch = MicroBatch(
                tokens_bT=tokens_bT[:, :-1].contiguous(), labels_bT=tokens_bT[:, 1:].contiguous(),
                documents_bT=torch.zeros(self.micro_batch, self.sequence, dtype=torch.int64), sample_ids_b=ids_b,
                domains_b=zeros_b, digests_b=zeros_b,
            )  # fmt: skip
            found.append(MicroBatch(*(t.pin_memory() for t in batch)) if self.device.type == "cuda" else batch)
        return found

    def build(self) -> MoEDecoder:
        """Our model on the device, in its precision."""
        torch.manual_seed(0)
        with self.device:
            return MoEDecoder(self.model, vocab_size=self.vocab_size).to(self.dtype)

    def build_transformers(self) -> nn.Module:
        """transformers' model of the same shape, in its best setting: grouped products, fused attention."""
        import transformers

        shape = self.model
        config = transformers.Glm4MoeConfig(
            vocab_size=self.vocab_size, hidden_size=shape.hidden_size, intermediate_size=shape.dense_intermediate_size,
            num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads, head_dim=shape.head_size, partial_rotary_factor=1.0,
            rms_norm_eps=shape.norm_eps, attention_bias=False, use_qk_norm=True, n_routed_experts=shape.num_experts,
            num_experts_per_tok=shape.top_k, moe_intermediate_size=shape.expert_intermediate_size,
            n_shared_experts=shape.num_shared_experts, first_k_dense_replace=shape.num_dense_layers, n_group=1,
            topk_group=1, routed_scaling_factor=1.0, norm_topk_prob=True, tie_word_embeddings=False,
            max_position_embeddings=self.sequence, experts_implementation="grouped_mm", attn_implementation="sdpa",
            use_cache=False, rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        )  # fmt: skip
        with self.device:
            model: nn.Module = transformers.Glm4MoeForCausalLM(config).to(self.dtype)
        return model


class OurStep:
    """A step of our loop. Several may share an engine, and so a model, each with hooks and a way to accumulate."""

    def __init__(
        self, engine: Engine, shape: StepShape, hooks: Mapping[str, Hook], mode: AccumulationMode = "streaming"
    ) -> None:
        self._engine, self._shape, self._count = engine, shape, 0
        self._hooks = HookList(hooks)
        self._counts_samples = self._hooks.has_weights and "expert_bias" in self._hooks.names
        self._hooks.on_start(
            RunContext(
                model=engine.module, total_steps=1000, global_batch_size=shape.micro_batch * shape.micro_batches,
                domain_names=("a",), domain_shares=(1.0,), run_dir=Path(), device=shape.device, seed=0,
                samples_per_row=1, has_weights=self._hooks.has_weights, is_frozen=mode == "frozen",
                excerpts=lambda samples: [""] * len(samples),
            )
        )  # fmt: skip
        self._accumulator = Accumulator(
            engine, self._hooks, mode=mode, normalization="tokens", num_micro_batches=shape.micro_batches,
            samples_per_row=1, device=shape.device,
        )  # fmt: skip
        self.records = Records()
        """What the last step recorded."""

    @staticmethod
    def start_engine(model: MoEDecoder, shape: StepShape) -> Engine:
        """The model under DeepSpeed."""
        return Engine(
            model, build_adamw(model, shape.optimizer, shape.device), shape.engine,
            micro_batch_size=shape.micro_batch, clip_norm=shape.optimizer.clip_norm,
        )  # fmt: skip

    def __call__(self) -> float:
        done = self.accumulate()
        self.optimize(done)
        self.after(done)
        assert done.loss is not None
        return done.loss

    def accumulate(self) -> AccumulatedStep:
        """Forwards and backwards of the step, with what hooks do in between."""
        module: Any = self._engine.module
        # Whoever shares the model may want loads otherwise; what they left is not of this step.
        module.count_by_sample(int(self._counts_samples))
        module.take_loads("train")
        self.records = Records()
        return self._accumulator.run(
            self._shape.batches(self._count), step=self._count + 1, applied_steps=self._count, recorder=self.records
        )

    def optimize(self, done: AccumulatedStep) -> None:
        """Clip and step: DeepSpeed's part."""
        self._hooks.before_step(done.context)
        self._engine.step(self._shape.optimizer.learning_rate, done.gradient_scale)

    def after(self, done: AccumulatedStep) -> None:
        """What hooks do once the optimizer has moved."""
        self._hooks.after_step(done.context, APPLIED)
        self._accumulator.budget.settle()
        self._count += 1


class TransformersStep:
    """A step of transformers' model under DeepSpeed in a bare loop, as DeepSpeed's documentation has it."""

    def __init__(self, model: nn.Module, shape: StepShape) -> None:
        import deepspeed

        settings: dict[str, Any] = shape.engine.deepspeed_dict(
            micro_batch_size=shape.micro_batch, clip_norm=shape.optimizer.clip_norm
        )
        settings["gradient_accumulation_steps"] = shape.micro_batches
        optimizer = build_adamw(model, shape.optimizer, shape.device)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self._engine.train()
        self._shape, self._count = shape, 0

    def __call__(self) -> float:
        losses = []
        for batch in (batch.to(self._shape.device) for batch in self._shape.batches(self._count)):
            loss = self._engine(input_ids=batch.tokens_bT, labels=batch.labels_bT, shift_labels=batch.labels_bT).loss
            self._engine.backward(loss)
            self._engine.step()
            losses.append(loss.detach())
        self._count += 1
        return float(torch.stack(losses).mean())
