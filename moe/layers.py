"""The dense parts of the decoder besides attention: normalisation, rotary positions, feed-forward.

Shape letters: B samples, T sequence, A heads, d head width, h rotated pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.recompute import remade


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension, computed in float32 (Zhang & Sennrich 2019)."""

    remakes = False
    """Whether the backward makes again what lies between input and output (moe/recompute.py)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return remade(self.remakes, self._normalize, x)

    def _normalize(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self._eps)
        return wide.to(x.dtype) * self.weight


def rotary_table(length: int, size: int, theta: float, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, float32 [T, size/2] (Su et al. 2021, arXiv 2104.09864)."""
    frequency = theta ** (-torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequency)
    return angle.cos(), angle.sin()


def rotate(x_BATd: Tensor, cos_Th: Tensor, sin_Th: Tensor) -> Tensor:
    """Turn the first 2h elements of each head, in the half-split pairing; the rest passes unchanged.

    The angles may also be [B, 1, T, h], where samples differ in their positions.
    """
    half = cos_Th.shape[-1]
    first, second, rest = x_BATd[..., :half], x_BATd[..., half : 2 * half], x_BATd[..., 2 * half :]
    cos, sin = cos_Th.to(x_BATd.dtype), sin_Th.to(x_BATd.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    remakes = False
    """Whether the backward makes the activation again (moe/recompute.py)."""

    def __init__(self, width: int, intermediate: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * intermediate, bias=False)
        self.down = nn.Linear(intermediate, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return remade(self.remakes, self._contract, self.gate_up(x))

    def _contract(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out
