"""torchtitan's training step on a CPU: its model, loss, clipping, optimizer and balancing hook, in its loop's order.

GLM-4-MoE out of torchtitan 0.3.0's parts: Qwen3's blocks take sigmoid routers, shared experts and a dense first layer
as well. Its Trainer takes CUDA for granted (`torch.cuda.set_device`, the name and memory of the device), so the step
here is what `Trainer.train_step` does between its log lines, without meshes. Attention is by its own
ScaledDotProductAttention: compiled flex attention has no backward on CPUs, and variable lengths want CUDA.

Its experts compute in bf16 whatever they are given. `fp32` is the same products in float32, at the seam it has for
other precisions: the better setting on processors where bf16 is slow, and the one whose gradients can be compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.layers import FeedForward
from moe.model import MoEDecoder
from tests.bench.peers import see_bench_packages
from trainer.data.loader import MicroBatch
from trainer.optim import OptimizerConfig


def build_model(config: ModelConfig, vocab_size: int, length: int, *, fp32: bool) -> nn.Module:
    """An untrained model of this shape; its weights are whatever was in memory. ImportError without torchtitan."""
    see_bench_packages()
    from torchtitan.models.common import config_utils as make
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.common.embedding import Embedding
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.nn_modules import RMSNorm
    from torchtitan.models.common.rope import CosSinRoPE
    from torchtitan.models.qwen3.model import Qwen3Model, Qwen3TransformerBlock

    width, head = config.hidden_size, config.head_size
    initial: dict[str, Any] = {"w1_param_init": {}, "w2w3_param_init": {}}

    def norm(size: int) -> RMSNorm.Config:
        return RMSNorm.Config(normalized_shape=size, eps=config.norm_eps)

    def block(num_experts: int) -> Qwen3TransformerBlock.Config:
        dense = make.make_ffn_config(dim=width, hidden_dim=config.dense_intermediate_size, **initial)
        return Qwen3TransformerBlock.Config(
            attention_norm=norm(width), ffn_norm=norm(width),
            attention=make.make_gqa_config(
                dim=width, n_heads=config.num_heads, n_kv_heads=config.num_kv_heads, head_dim=head, fuse_qkv=True,
                wqkv_param_init={}, wo_param_init={}, inner_attention=ScaledDotProductAttention.Config(),
                rope=CosSinRoPE.Config(dim=head, max_seq_len=length, theta=config.rope_theta), qk_norm=norm(head),
            ),
            feed_forward=None if num_experts else dense,
            moe=_mixture(config, make, initial, fp32=fp32) if num_experts else None,
        )  # fmt: skip

    return Qwen3Model.Config(
        vocab_size=vocab_size, dim=width, norm=norm(width), layers=[block(e) for e in config.block_experts],
        tok_embeddings=Embedding.Config(num_embeddings=vocab_size, embedding_dim=width),
        lm_head=Linear.Config(in_features=width, out_features=vocab_size),
    ).build()  # fmt: skip


def _mixture(config: ModelConfig, make: Any, initial: dict[str, Any], *, fp32: bool) -> Any:
    width, inner, experts = config.hidden_size, config.expert_intermediate_size, config.num_experts
    routed = make.make_routed_experts_config(
        dim=width, hidden_dim=inner, num_experts=experts, top_k=config.top_k, param_init={}, comm_backend="standard"
    )
    if fp32:
        routed.inner_experts = _float32_experts().Config(dim=width, hidden_dim=inner, num_experts=experts)
    return make.make_moe_config(
        num_experts=experts, routed_experts=routed,
        router=make.make_router_config(
            dim=width, num_experts=experts, gate_param_init={}, top_k=config.top_k, score_func=config.router_score,
            route_norm=config.normalize_gates, route_scale=config.routed_scale,
        ),
        shared_experts=make.make_ffn_config(dim=width, hidden_dim=inner * config.num_shared_experts, **initial),
    )  # fmt: skip


def _float32_experts() -> Any:
    from torchtitan.models.common.moe import GroupedExperts

    class Float32Experts(GroupedExperts):
        @dataclass(kw_only=True, slots=True)
        class Config(GroupedExperts.Config):
            pass

        def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
            ends = torch.cumsum(num_tokens_per_expert_E, dim=0, dtype=torch.int32)
            gate, up = (self._grouped_mm(A=x_RD, B_t=w.mT, offs=ends) for w in (self.w1_EFD, self.w3_EFD))
            return self._grouped_mm(A=F.silu(gate) * up, B_t=self.w2_EDF.mT, offs=ends)

    return Float32Experts


def their_layout(ours: MoEDecoder) -> dict[str, Tensor]:
    """Our parameters under their names in a state dict of theirs."""
    found = {
        "tok_embeddings.weight": ours.embedding.weight, "norm.weight": ours.final_norm.weight,
        "lm_head.weight": ours.head.weight,
    }  # fmt: skip

    def feed_forward(name: str, module: FeedForward) -> dict[str, Tensor]:
        gate, up = module.gate_up.weight.chunk(2)
        return {f"{name}.w1.weight": gate, f"{name}.w3.weight": up, f"{name}.w2.weight": module.down.weight}

    for number, block in enumerate(ours.blocks):
        at, attention, mlp = f"layers.{number}", block.attention, block.mlp
        found |= {
            f"{at}.attention_norm.weight": block.attention_norm.weight,
            f"{at}.ffn_norm.weight": block.mlp_norm.weight,
        }
        for name, module in (
            ("qkv_linear.wq", attention.query), ("qkv_linear.wk", attention.key), ("qkv_linear.wv", attention.value),
            ("wo", attention.output), ("q_norm", attention.query_norm), ("k_norm", attention.key_norm),
        ):  # fmt: skip
            found[f"{at}.attention.{name}.weight"] = module.weight
        if isinstance(mlp, FeedForward):
            found |= feed_forward(f"{at}.feed_forward", mlp)
            continue
        experts, (gate, up) = f"{at}.moe.routed_experts.inner_experts", mlp.experts.gate_up.chunk(2, dim=-1)
        found |= {f"{experts}.w1_EFD": gate.mT, f"{experts}.w3_EFD": up.mT, f"{experts}.w2_EDF": mlp.experts.down.mT}
        found[f"{at}.moe.router.gate.weight"] = mlp.router.weight
        found[f"{at}.moe.expert_bias_E"] = mlp.router.expert_bias_E
        found |= feed_forward(f"{at}.moe.shared_experts", mlp.shared)
    return {name: tensor.detach() for name, tensor in found.items()}


class TorchtitanStep:
    """One optimizer step a call; returns its loss."""

    def __init__(self, model: nn.Module, optimizer: OptimizerConfig) -> None:
        from torchtitan.components.loss import CrossEntropyLoss
        from torchtitan.components.optimizer import default_adamw, register_moe_load_balancing_hook
        from torchtitan.distributed.utils import clip_grad_norm_

        self._model, self._clip, self._clip_norm = model, clip_grad_norm_, optimizer.clip_norm
        self._loss = CrossEntropyLoss.Config().build()
        self._optimizers = default_adamw(
            optimizer.learning_rate, betas=(optimizer.beta1, optimizer.beta2), eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        ).build(model_parts=[model])  # fmt: skip
        alone = SimpleNamespace(ep_enabled=False, tp=1, get_optional_mesh=lambda name: None)
        register_moe_load_balancing_hook(self._optimizers, [model], alone)

    def __call__(self, batches: Sequence[MicroBatch]) -> float:
        self._optimizers.zero_grad()
        valid = torch.tensor(sum(batch.labels_bT.numel() for batch in batches))
        losses = []
        for batch in batches:
            loss, _ = self._loss(self._model(batch.tokens_bT), batch.labels_bT, valid)
            loss.backward()
            losses.append(loss.detach())
        self._clip(self._model.parameters(), self._clip_norm, foreach=True)
        self._optimizers.step()
        return float(torch.stack(losses).sum())
