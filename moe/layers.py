"""The dense parts of the decoder: normalisation, rotary positions, attention, feed-forward.

Shape letters: B samples, T sequence, D model width, A query heads, G key-value heads, d head width, h rotated pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.documents import Layout, attend


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension, computed in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
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


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, head = config.hidden_size, config.head_size
        self._heads, self._kv_heads, self._head = config.num_heads, config.num_kv_heads, head
        self._theta, self._rotary = config.rope_theta, config.rotary_size
        self.query = nn.Linear(width, self._heads * head, bias=config.attention_bias)
        self.key = nn.Linear(width, self._kv_heads * head, bias=config.attention_bias)
        self.value = nn.Linear(width, self._kv_heads * head, bias=config.attention_bias)
        self.output = nn.Linear(self._heads * head, width, bias=False)
        self.query_norm = RMSNorm(head, config.norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(head, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x_BTD: Tensor, layout: Layout) -> Tensor:
        batch, length, _ = x_BTD.shape

        def split(projected: Tensor, heads: int) -> Tensor:
            return projected.view(batch, length, heads, self._head)

        query_BATd = self.query_norm(split(self.query(x_BTD), self._heads)).transpose(1, 2)
        key_BGTd = self.key_norm(split(self.key(x_BTD), self._kv_heads)).transpose(1, 2)
        value_BGTd = split(self.value(x_BTD), self._kv_heads).transpose(1, 2)
        mixed_BATd = attend(
            rotate(query_BATd, layout.cos, layout.sin),
            rotate(key_BGTd, layout.cos, layout.sin),
            value_BGTd,
            layout.mask,
        )
        mixed: Tensor = self.output(mixed_BATd.transpose(1, 2).reshape(batch, length, -1))
        return mixed


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, width: int, intermediate: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * intermediate, bias=False)
        self.down = nn.Linear(intermediate, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out
