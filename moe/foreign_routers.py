"""Routers in models that are not ours: where their selection bias lies, and which experts they chose.

Models of transformers keep the bias that balances experts in a buffer or a frozen parameter, in one of three places,
and every router returns the indices of the chosen experts as the only integer tensor of its outputs:

- in the router: `gate.e_score_correction_bias` (DeepSeek-V3, GLM-4-MoE and most others);
- in a child of the router: `gate.moe_statics.e_score_correction_bias` (ERNIE 4.5);
- in the block that owns the router and hands it over as an argument (MiniMax-M2, LFM2, AFMoE).

The indices are taken as returned, never computed again: group limits, scores and jitter are the family's own business.

Shape letters: E experts, N tokens, K experts a token uses.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainer.errors import ConfigError

BIAS_NAMES = ("e_score_correction_bias", "expert_bias", "expert_bias_E")
_REFUSED_NAMES = {
    "balancing_biases": (
        "returns expert 0 for tokens that skip all experts, so its choices cannot be counted from outside"
    ),
}


@dataclass(frozen=True, kw_only=True)
class ForeignRouter:
    """One router of somebody's model. Give your own to BiasBalancer if your model's are not found."""

    name: str
    """For messages and metrics."""
    module: nn.Module
    """Its forward returns the chosen experts, [..., K], as the only integer tensor among its outputs."""
    owner: nn.Module
    """The module that has the bias."""
    bias_name: str
    """Attribute of `owner` whose tensor of E numbers is added to the scores in the selection, and in nothing else."""
    num_experts: int
    """Experts that are to be balanced, the first ones: entries of the bias beyond them are left alone."""

    @property
    def bias(self) -> Tensor:
        """The whole bias as the model has it."""
        return cast(Tensor, getattr(self.owner, self.bias_name))

    @property
    def bias_E(self) -> Tensor:
        """A view of the balanced part of the bias, float32 once it was made exact; writing to it moves the router."""
        return self.bias.view(-1)[: self.num_experts]

    def indices(self, outputs: Any) -> Tensor:
        """The chosen experts among the outputs of `module`, int64 [N, K]."""
        found = [value for value in _flat(outputs) if not value.is_floating_point() and value.dtype != torch.bool]
        if len(found) != 1 or found[0].dim() < 2:
            raise ConfigError(
                f"{self.name}: expected the indices of the chosen experts [tokens, k] as the only integer tensor that "
                f"{type(self.module).__name__} returns, found {[tuple(value.shape) for value in found]}"
            )
        return found[0].detach().flatten(0, -2)


def _flat(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    values = outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, (tuple, list)) else ()
    return [value for value in values if isinstance(value, Tensor)]


def find_routers(model: nn.Module) -> list[ForeignRouter]:
    """Every router of `model` with a selection bias, in the model's order.

    Raises ConfigError if there is none, saying what was looked for, or if one is known not to be balanceable.
    """
    found = []
    parents = {child: (parent, name) for parent in model.modules() for name, child in parent.named_children()}
    for name, owner in model.named_modules():
        for refused, reason in _REFUSED_NAMES.items():
            if isinstance(getattr(owner, refused, None), Tensor):
                raise ConfigError(f"{name}.{refused}: {type(owner).__name__} {reason}; it is not supported")
        for bias_name in BIAS_NAMES:
            bias = _own_tensor(owner, bias_name)
            if bias is not None:
                module = _router_of(owner, bias_name, parents)
                num_experts = bias.numel() - _idle_experts(module, parents)
                found.append(
                    ForeignRouter(name=name, module=module, owner=owner, bias_name=bias_name, num_experts=num_experts)
                )
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no router with a selection bias: looked in all its modules for a buffer or "
            f"parameter called {' or '.join(BIAS_NAMES)}. Families that route without one (Mixtral, Qwen-MoE ...) "
            "cannot be balanced by a bias; for routers of your own pass routers=[ForeignRouter(...)]"
        )
    return found


def _own_tensor(owner: nn.Module, name: str) -> Tensor | None:
    value = owner._buffers.get(name)
    return owner._parameters.get(name) if value is None else value


def _router_of(owner: nn.Module, bias_name: str, parents: dict[nn.Module, tuple[nn.Module, str]]) -> nn.Module:
    takers = [child for child in owner.children() if bias_name in inspect.signature(child.forward).parameters]
    if len(takers) == 1:
        return takers[0]
    parent = parents.get(owner)
    if parent is not None and parent[1] == "moe_statics":
        return parent[0]
    return owner


def _idle_experts(router: nn.Module, parents: dict[nn.Module, tuple[nn.Module, str]]) -> int:
    """Experts without weights at the end of the bias (LongCat): how many tokens take the short way is a matter of
    budget, not of balance."""
    block = parents[router][0] if router in parents else None
    return getattr(getattr(block, "experts", None), "zero_expert_num", None) or 0


def keep_exact(router: ForeignRouter) -> None:
    """Make the bias a float32 buffer that stays float32 whatever the model is cast to.

    In bfloat16 a bias of 0.5 moves in steps of 0.002 to 0.004: a rate of 1e-3 would be lost. Names in the state dict
    stay as they are, so save_pretrained and from_pretrained work as before. Calling it again changes nothing.
    """
    owner, name = router.owner, router.bias_name
    bias = _own_tensor(owner, name)
    assert bias is not None
    if hasattr(bias, "ds_id") or bias.numel() < router.num_experts:
        raise ConfigError(
            f"{router.name}.{name} is a parameter partitioned by ZeRO-3; build the balancer before "
            "deepspeed.initialize and outside zero.Init, or use ZeRO 2"
        )
    exact = bias.detach().float().clone()
    if name in owner._parameters:
        del owner._parameters[name]
        owner.register_buffer(name, exact)
    else:
        owner._buffers[name] = exact
    if not isinstance(owner, _KeepsBias):
        owner.__class__ = _keeping_class(type(owner))
        owner._exact = set()  # type: ignore[assignment]
    cast(_KeepsBias, owner)._exact.add(name)


class _KeepsBias(nn.Module):
    """Mixed into a module's class: casts pass its selection bias by. Devices are followed, the type is not."""

    _exact: set[str]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_KeepsBias":
        exact = {name: bias for name in self._exact if (bias := self._buffers[name]) is not None}
        super()._apply(fn, recurse)
        for name, bias in exact.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != bias.dtype:
                self._buffers[name] = bias.to(device=moved.device)
        return self


_keeping: dict[type[nn.Module], type[nn.Module]] = {}


def _keeping_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `cls` that keeps the bias, under the same name: isinstance and printing see no difference."""
    if cls not in _keeping:
        _keeping[cls] = type(cls.__name__, (_KeepsBias, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})
    return _keeping[cls]
