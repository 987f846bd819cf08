"""AdamW with decay on matrices only."""

import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) and the norm gradients are clipped to."""

    learning_rate: float = 3e-4
    """Peak of the schedule."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decay of weight matrices; norms, biases and embeddings have none."""
    clip_norm: float = 1.0
    """Largest norm of the global gradient; 0 does not clip."""

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        found = []
        for name in ("learning_rate", "eps"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                found.append(f"{name}: {value} must be finite and positive")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                found.append(f"{name}: {value} must be in [0, 1)")
        for name in ("weight_decay", "clip_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                found.append(f"{name}: {value} must be finite and not negative")
        return found


def build_adamw(model: nn.Module, config: OptimizerConfig, device: torch.device) -> torch.optim.AdamW:
    """Fused AdamW over every parameter of `model`: one group with weight decay, one without, and
    the same for each expert group."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[tuple[bool, str], list[nn.Parameter]] = {(True, ""): [], (False, ""): []}
    for parameter in model.parameters():
        is_matrix = parameter.ndim >= 2 and id(parameter) not in embeddings
        # DeepSpeed's convention for parameters whose gradients are not reduced over all ranks.
        expert_group = "" if getattr(parameter, "allreduce", True) else str(parameter.group_name)  # type: ignore[attr-defined]
        groups.setdefault((is_matrix, expert_group), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": config.weight_decay if decays else 0.0,
                **({"moe": True, "name": expert_group} if expert_group else {}),
            }
            for (decays, expert_group), parameters in groups.items()
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=device.type in ("cpu", "cuda"),
    )
