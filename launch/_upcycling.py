"""The options of upcycling, what they make of a dense model's shape, and of its matrices (moe/upcycling.py)."""

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from moe.config import ModelConfig
from moe.upcycling import upcycle_down, upcycle_gate_up, upcycle_problems, upcycle_router
from trainer.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upcycling:
    """How a dense model becomes a mixture of experts."""

    num_experts: int
    top_k: int
    granularity: int
    dense_layers: int
    router_score: Literal["sigmoid", "softmax"]
    router_std: float
    seed: int


def add_upcycling_options(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    upcycling = parser.add_argument_group("upcycling of a dense model")
    upcycling.add_argument("--experts", type=int, help="experts a layer")
    upcycling.add_argument("--top-k", type=int, help="experts a token uses (default: 2 x granularity)")
    upcycling.add_argument("--granularity", type=int, help="pieces each feed-forward is cut into (default 1)")
    upcycling.add_argument("--dense-layers", type=int, help="first layers that stay dense (default 0)")
    upcycling.add_argument("--router", choices=["sigmoid", "softmax"], help="score function (default sigmoid)")
    upcycling.add_argument("--router-std", type=float, help="deviation of the new routers' weights (default 0.02)")
    upcycling.add_argument("--seed", type=int, help="seed of the new routers (default 0)")


def plan_upcycling(arguments: argparse.Namespace, model: ModelConfig) -> Upcycling | None:
    """How to upcycle, or None for a model that has experts already. Raises ConfigError for options that do not fit."""
    names = ("experts", "top_k", "granularity", "dense_layers", "router", "router_std", "seed")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    is_dense = not any(model.block_experts)
    if not is_dense:
        if given:
            raise ConfigError(f"--{next(iter(given)).replace('_', '-')}: the model has experts already; leave it out")
        return None
    if "experts" not in given:
        raise ConfigError("--experts: the model is dense; say how many experts its feed-forwards become")
    granularity = given.get("granularity", 1)
    plan = Upcycling(
        num_experts=given["experts"],
        top_k=given.get("top_k", 2 * granularity),
        granularity=granularity,
        dense_layers=given.get("dense_layers", 0),
        router_score=given.get("router", "sigmoid"),
        router_std=given.get("router_std", 0.02),
        seed=given.get("seed", 0),
    )
    problems = upcycle_problems(
        width=model.dense_intermediate_size,
        num_experts=plan.num_experts,
        top_k=plan.top_k,
        granularity=plan.granularity,
    )
    if not 0 <= plan.dense_layers < model.num_layers:
        problems.append(f"--dense-layers: {plan.dense_layers} must be in [0, {model.num_layers})")
    if not 0 < plan.router_std < float("inf"):
        problems.append(f"--router-std: {plan.router_std} must be finite and positive")
    if problems:
        raise ConfigError(*problems)
    return plan


def upcycled_config(dense: ModelConfig, plan: Upcycling) -> ModelConfig:
    """The shape of the new model."""
    return dataclasses.replace(
        dense,
        num_dense_layers=plan.dense_layers,
        num_experts=plan.num_experts,
        top_k=plan.top_k,
        expert_intermediate_size=dense.dense_intermediate_size // plan.granularity,
        num_shared_experts=0,
        router_score=plan.router_score,
        normalize_gates=True,
        routed_scale=float(plan.granularity),
    )


def upcycle(
    mlp: str, matrix: str, tensor: Tensor, plan: Upcycling, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the layer `mlp` by name, from a matrix of its dense feed-forward; `gate_up` brings the router too."""
    sizes = {"num_experts": plan.num_experts, "granularity": plan.granularity}
    if matrix == "down.weight":
        yield f"{mlp}.experts.down", upcycle_down(tensor, **sizes)
        return
    yield f"{mlp}.experts.gate_up", upcycle_gate_up(tensor, **sizes)
    router = upcycle_router(**sizes, hidden_size=tensor.shape[1], std=plan.router_std, generator=generator)
    yield f"{mlp}.router.weight", router.to(tensor.dtype)
    yield f"{mlp}.router.expert_bias_E", torch.zeros(plan.num_experts)
