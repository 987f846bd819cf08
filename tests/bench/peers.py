"""Other implementations of the same layer, given our weights: what `moe_layer` compares with.

A builder makes the peer for a workload or raises; the bench then lists the peer as not run, with the reason. Each peer
says how the gradients of its parameters read in our layout, so that they can be compared.

Shape letters: N tokens, R rows, D model width, F expert width, E experts, K experts a token uses, C capacity.
"""

import os
import site
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.grouped import grouped_swiglu, sorted_rows
from moe.layers import FeedForward

Gradients = dict[str, Tensor]
Builder = Callable[[ModelConfig, "Weights"], "Peer"]


class Weights(NamedTuple):
    """A layer's weights in our layout: router [E, D], gate_up [E, D, 2F], down [E, F, D]."""

    router: Tensor
    gate_up: Tensor
    down: Tensor


class Peer(NamedTuple):
    """An implementation that is ready to run on x [1, N, D]."""

    name: str
    module: nn.Module
    gradients: Callable[[Gradients], tuple[Tensor, Tensor, Tensor]]
    """The gradients of router, gate_up and down in our layout, from those of the module's parameters."""
    sigmoid: bool = False
    """Gates come from a sigmoid instead of a softmax."""
    bf16: bool = False
    """Computes its experts in bf16 whatever it is given: ours beside it is in bf16 too."""


def _transpose(weight: Tensor) -> Tensor:
    return weight.transpose(-2, -1)


def _load(module: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    with torch.no_grad():
        for name, value in values.items():
            module.get_parameter(name).copy_(value)
    return module


def _transformers(name: str, block: nn.Module, weights: Weights, **traits: Any) -> Peer:
    values = {
        "gate.weight": weights.router,
        "experts.gate_up_proj": _transpose(weights.gate_up),
        "experts.down_proj": _transpose(weights.down),
    }

    def gradients(g: Gradients) -> tuple[Tensor, Tensor, Tensor]:
        return g["gate.weight"], _transpose(g["experts.gate_up_proj"]), _transpose(g["experts.down_proj"])

    return Peer(name, _load(block, values), gradients, **traits)


def qwen3(config: ModelConfig, weights: Weights) -> Peer:
    """transformers' Qwen3-MoE block."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    theirs = Qwen3MoeConfig(
        hidden_size=config.hidden_size, num_experts=config.num_experts, num_experts_per_tok=config.top_k,
        moe_intermediate_size=config.expert_intermediate_size, norm_topk_prob=True, experts_implementation="grouped_mm",
    )  # fmt: skip
    return _transformers("transformers_qwen3_grouped_mm", Qwen3MoeSparseMoeBlock(theirs), weights)


class _Nothing(nn.Module):
    def forward(self, x: Tensor) -> float:
        return 0.0


def _without_shared(name: str, block: nn.Module, weights: Weights) -> Peer:
    """A transformers layer without its shared expert, which the workloads do not have."""
    block.shared_experts = _Nothing()
    nn.init.zeros_(block.gate.e_score_correction_bias)
    return _transformers(name, block, weights, sigmoid=True)


def _grouped_routing(config: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.hidden_size, "n_routed_experts": config.num_experts, "num_experts_per_tok": config.top_k,
        "moe_intermediate_size": config.expert_intermediate_size, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
        "routed_scaling_factor": 1.0, "norm_topk_prob": True, "experts_implementation": "grouped_mm",
    }  # fmt: skip


def deepseek_v3(config: ModelConfig, weights: Weights) -> Peer:
    """transformers' DeepSeek-V3 layer."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    block = DeepseekV3MoE(DeepseekV3Config(**_grouped_routing(config)))
    return _without_shared("transformers_deepseek_v3_grouped_mm", block, weights)


def glm4(config: ModelConfig, weights: Weights) -> Peer:
    """transformers' GLM-4-MoE layer."""
    from transformers import Glm4MoeConfig
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE

    block = Glm4MoeMoE(Glm4MoeConfig(**_grouped_routing(config)))
    return _without_shared("transformers_glm4_grouped_mm", block, weights)


class _Own(nn.Module):
    """Our weights and softmax routing, with some other way to run the experts."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        super().__init__()
        self.config = config
        self.router, self.gate_up, self.down = (nn.Parameter(weight.detach().clone()) for weight in weights)

    def route(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        scores_NK, indices_NK = (x_ND @ self.router.T).softmax(dim=-1).topk(self.config.top_k, dim=-1)
        return scores_NK / scores_NK.sum(dim=-1, keepdim=True), indices_NK


def _own_gradients(g: Gradients) -> tuple[Tensor, Tensor, Tensor]:
    return g["router"], g["gate_up"], g["down"]


class GroupedMM(_Own):
    """F.grouped_mm on sorted rows, and back by a permutation: what we run on CUDA."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        gates_NK, indices_NK = self.route(x_ND)
        order, counts_E = sorted_rows(indices_NK, self.config.num_experts)
        outputs = grouped_swiglu(x_ND[order // self.config.top_k], counts_E, self.gate_up, self.down)
        by_token_NKD = torch.empty_like(outputs).index_copy(0, order, outputs).unflatten(0, indices_NK.shape)
        return (by_token_NKD * gates_NK.unsqueeze(-1)).sum(dim=1).view_as(x_BTD)


class PaddedBmm(_Own):
    """Every expert's rows padded to those of the busiest, and batched products."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        gates_NK, indices_NK = self.route(x_ND)
        order, counts_E = sorted_rows(indices_NK, self.config.num_experts)
        experts, capacity = indices_NK.flatten()[order], int(counts_E.max())
        slot_R = (
            experts * capacity
            + torch.arange(len(order), device=x_BTD.device)
            - (counts_E.cumsum(0) - counts_E)[experts]
        )
        padded_ECD = x_ND.new_zeros(len(counts_E) * capacity, x_ND.shape[1])
        padded_ECD = padded_ECD.index_copy(0, slot_R, x_ND[order // self.config.top_k]).unflatten(0, (-1, capacity))
        gate, up = torch.bmm(padded_ECD, self.gate_up).chunk(2, dim=-1)
        outputs = torch.bmm(F.silu(gate) * up, self.down).flatten(0, 1)[slot_R]
        weighted = outputs * gates_NK.flatten()[order].unsqueeze(1)
        return torch.zeros_like(x_ND).index_add(0, order // self.config.top_k, weighted).view_as(x_BTD)


class Megatron(nn.Module):
    """megatron-core's permutation and SequentialMLP behind its plain-torch routing."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        import torch.distributed as dist
        from megatron.core import parallel_state
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
        from megatron.core.transformer.mlp import MLPSubmodules
        from megatron.core.transformer.moe import moe_utils
        from megatron.core.transformer.moe.experts import SequentialMLP
        from megatron.core.transformer.transformer_config import TransformerConfig

        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel()
        theirs = TransformerConfig(
            num_layers=1, hidden_size=config.hidden_size, num_attention_heads=8, num_moe_experts=config.num_experts,
            moe_router_topk=config.top_k, ffn_hidden_size=config.expert_intermediate_size,
            moe_ffn_hidden_size=config.expert_intermediate_size, gated_linear_unit=True, activation_func=F.silu,
            add_bias_linear=False, bias_activation_fusion=False, use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
        )  # fmt: skip
        self.gate = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.experts = SequentialMLP(
            config.num_experts, theirs, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ProcessGroupCollection.use_mpu_process_groups(),
        )  # fmt: skip
        self._utils, self._top_k = moe_utils, config.top_k

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND, utils = x_BTD.flatten(0, 1), self._utils
        probs_NE, map_NE = utils.topk_routing_with_score_function(
            x_ND @ self.gate.T, self._top_k, use_pre_softmax=False, score_function="softmax"
        )
        rows, permuted_probs, order = utils.permute(
            x_ND, map_NE, probs=probs_NE, num_out_tokens=len(x_ND) * self._top_k
        )[:3]
        outputs, _ = self.experts(rows, map_NE.sum(dim=0), permuted_probs)
        return utils.unpermute(outputs, order, x_ND.shape, routing_map=map_NE).view_as(x_BTD)


def megatron(config: ModelConfig, weights: Weights) -> Peer:
    """megatron-core's SequentialMLP, which is what its CPU path has."""
    module = Megatron(config)
    values = {"gate": weights.router}
    fc1, fc2 = ("experts.local_experts.{}.linear_fc{}.weight".format("{}", n) for n in (1, 2))
    for expert in range(config.num_experts):
        values[fc1.format(expert)] = weights.gate_up[expert].T
        values[fc2.format(expert)] = weights.down[expert].T

    def gradients(g: Gradients) -> tuple[Tensor, Tensor, Tensor]:
        each = range(config.num_experts)
        return (
            g["gate"],
            torch.stack([g[fc1.format(e)].T for e in each]),
            torch.stack([g[fc2.format(e)].T for e in each]),
        )

    return Peer("megatron_sequential", _load(module, values), gradients)


def deepspeed(config: ModelConfig, weights: Weights) -> Peer:
    """deepspeed.moe's layer without dropping, its experts being our dense feed-forward."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.moe.experts import Experts
    from deepspeed.moe.sharded_moe import MOELayer, TopKGate

    class Layer(MOELayer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x, None)

    width, experts = config.hidden_size, config.num_experts
    gate = TopKGate(width, experts, config.top_k, drop_tokens=False, top2_2nd_expert_sampling=False)
    module = Layer(gate, Experts(FeedForward(width, config.expert_intermediate_size), experts), "none", 1, experts)
    gate_up, down = ("experts.deepspeed_experts.{}." + name + ".weight" for name in ("gate_up", "down"))
    values = {"gate.wg.weight": weights.router}
    for expert in range(experts):
        values[gate_up.format(expert)] = weights.gate_up[expert].T
        values[down.format(expert)] = weights.down[expert].T

    def gradients(g: Gradients) -> tuple[Tensor, Tensor, Tensor]:
        return (
            g["gate.wg.weight"],
            torch.stack([g[gate_up.format(e)].T for e in range(experts)]),
            torch.stack([g[down.format(e)].T for e in range(experts)]),
        )

    return Peer("deepspeed_moe", _load(module, values), gradients)


def see_bench_packages() -> None:
    """Let what `make bench-peers` installed be imported, behind our own packages, which stay the versions they are."""
    for folder in Path(".venv-bench").glob("lib/python*/site-packages"):
        site.addsitedir(str(folder))


def torchtitan(config: ModelConfig, weights: Weights) -> Peer:
    """torchtitan's MoE, which computes its experts in bf16 whatever it is given. From `make bench-peers`."""
    see_bench_packages()
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    width, inner, experts = config.hidden_size, config.expert_intermediate_size, config.num_experts
    module = MoE.Config(
        num_experts=experts,
        load_balance_coeff=None,
        router=TokenChoiceTopKRouter.Config(
            num_experts=experts, gate=Linear.Config(in_features=width, out_features=experts), top_k=config.top_k,
            score_func="softmax", route_norm=True,
        ),
        routed_experts=RoutedExperts.Config(
            inner_experts=GroupedExperts.Config(dim=width, hidden_dim=inner, num_experts=experts),
            token_dispatcher=LocalTokenDispatcher.Config(num_experts=experts, top_k=config.top_k),
        ),
    ).build()  # fmt: skip
    gate, up = weights.gate_up.chunk(2, dim=-1)
    w1, w2, w3 = (f"routed_experts.inner_experts.{name}" for name in ("w1_EFD", "w2_EDF", "w3_EFD"))
    values = {"router.gate.weight": weights.router, w1: _transpose(gate), w3: _transpose(up)}
    values[w2] = _transpose(weights.down)

    def gradients(g: Gradients) -> tuple[Tensor, Tensor, Tensor]:
        return g["router.gate.weight"], _transpose(torch.cat([g[w1], g[w3]], dim=1)), _transpose(g[w2])

    return Peer("torchtitan_bf16", _load(module, values), gradients, bf16=True)


class Sonic(nn.Module):
    """sonic-moe's layer, which also returns a balancing loss. Hopper and Blackwell only."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        from sonicmoe import MoE
        from sonicmoe.enums import ActivationType

        self.moe = MoE(
            num_experts=config.num_experts, num_experts_per_tok=config.top_k, hidden_size=config.hidden_size,
            intermediate_size=config.expert_intermediate_size, activation_function=ActivationType.SWIGLU,
            add_bias=False, std=0.02,
        )  # fmt: skip

    def forward(self, x_BTD: Tensor) -> Tensor:
        output: Tensor = self.moe(x_BTD)[0]
        return output


def sonic(config: ModelConfig, weights: Weights) -> Peer:
    """sonic-moe: rows of gate and up take turns in its first weight, [E, 2F, D]."""
    gate_EFD, up_EFD = (_transpose(half) for half in weights.gate_up.chunk(2, dim=-1))
    up_gate = torch.stack([gate_EFD, up_EFD], dim=2).flatten(1, 2)
    router, fc, proj = "moe.router.weight", "moe.c_fc.weight", "moe.c_proj.weight"
    module = _load(Sonic(config), {router: weights.router, fc: up_gate, proj: _transpose(weights.down)})

    def gradients(g: Gradients) -> tuple[Tensor, Tensor, Tensor]:
        halves = g[fc].unflatten(1, (-1, 2)).unbind(dim=2)
        return g[router], _transpose(torch.cat(halves, dim=1)), _transpose(g[proj])

    return Peer("sonic_moe", module, gradients)


def _grouped_mm(config: ModelConfig, weights: Weights) -> Peer:
    return Peer("grouped_mm", GroupedMM(config, weights), _own_gradients)


def _padded_bmm(config: ModelConfig, weights: Weights) -> Peer:
    return Peer("padded_bmm", PaddedBmm(config, weights), _own_gradients)


PEERS: dict[str, Builder] = {
    "transformers_qwen3_grouped_mm": qwen3,
    "transformers_deepseek_v3_grouped_mm": deepseek_v3,
    "grouped_mm": _grouped_mm,
    "padded_bmm": _padded_bmm,
    "megatron_sequential": megatron,
    "deepspeed_moe": deepspeed,
    "torchtitan_bf16": torchtitan,
}
GPU_PEERS: dict[str, Builder] = {
    "transformers_qwen3_grouped_mm": qwen3,
    "transformers_glm4_grouped_mm": glm4,
    "torchtitan_bf16": torchtitan,
    "sonic_moe": sonic,
    "padded_bmm": _padded_bmm,
}
"""Loops over experts are left out: what they cost on a GPU is their launches."""
