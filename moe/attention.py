"""The attentions a block can have: grouped queries, or queries, keys and values out of low-rank latents.

Both get the places of tokens from one `Layout`, so document masks and positions are the same thing to either.

Shape letters: B samples, T sequence, D model width, A query heads, G key-value heads, d head width, n its part without
positions, r its rotated part, v width of a value, C width of the latent, h rotated pairs.
"""

import torch
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.documents import Layout, attend_whole_rows
from moe.layers import RMSNorm, rotate

_LATENT_EPS = 1e-6  # DeepSeek's code fixes it for the latents, whatever the model's norm_eps


def build_attention(config: ModelConfig) -> nn.Module:
    """The attention that `config.attention` names; called with hidden states [B, T, D] and a Layout."""
    return LatentAttention(config) if config.attention == "mla" else GroupedQueryAttention(config)


class GroupedQueryAttention(nn.Module):
    """Causal attention whose query heads share fewer key-value heads (Ainslie et al. 2023, arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, head = config.hidden_size, config.head_size
        self._heads, self._kv_heads, self._head = config.num_heads, config.num_kv_heads, head
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
        mixed_BATd = attend_whole_rows(
            rotate(query_BATd, layout.cos, layout.sin),
            rotate(key_BGTd, layout.cos, layout.sin),
            value_BGTd,
            layout,
        )
        mixed: Tensor = self.output(mixed_BATd.transpose(1, 2).reshape(batch, length, -1))
        return mixed


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; DeepSeek-V3, arXiv 2412.19437).

    Keys and values of all heads come out of one narrow latent, which is what a server has to cache. Positions turn a
    part of each query head and one key part that all heads share. Rotated pairs are laid out half-split, as in the
    rest of the model; DeepSeek's files interleave them (moe/hf_layout.py reorders).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, shape = config.hidden_size, config.mla
        self._heads, self._shape = config.num_heads, shape
        query_width = self._heads * shape.query_size
        if shape.q_lora_rank:
            self.query_compress = nn.Linear(width, shape.q_lora_rank, bias=False)
            self.query_norm = RMSNorm(shape.q_lora_rank, _LATENT_EPS)
            self.query_expand = nn.Linear(shape.q_lora_rank, query_width, bias=False)
        else:
            self.query = nn.Linear(width, query_width, bias=False)
        self.kv_compress = nn.Linear(width, shape.kv_lora_rank + shape.qk_rope_head_dim, bias=False)
        self.kv_norm = RMSNorm(shape.kv_lora_rank, _LATENT_EPS)
        self.kv_expand = nn.Linear(
            shape.kv_lora_rank, self._heads * (shape.qk_nope_head_dim + shape.v_head_dim), bias=False
        )
        self.output = nn.Linear(self._heads * shape.v_head_dim, width, bias=False)

    def forward(self, x_BTD: Tensor, layout: Layout) -> Tensor:
        shape, (batch, length, _) = self._shape, x_BTD.shape
        query_BTq = (
            self.query_expand(self.query_norm(self.query_compress(x_BTD))) if shape.q_lora_rank else self.query(x_BTD)
        )
        query_BATd = query_BTq.view(batch, length, self._heads, -1).transpose(1, 2)
        query_BATn, query_BATr = query_BATd.split([shape.qk_nope_head_dim, shape.qk_rope_head_dim], dim=-1)
        latent_BTC, key_BTr = self.kv_compress(x_BTD).split([shape.kv_lora_rank, shape.qk_rope_head_dim], dim=-1)
        expanded_BATe = self.kv_expand(self.kv_norm(latent_BTC)).view(batch, length, self._heads, -1).transpose(1, 2)
        key_BATn, value_BATv = expanded_BATe.split([shape.qk_nope_head_dim, shape.v_head_dim], dim=-1)
        key_BATr = rotate(key_BTr.unsqueeze(1), layout.cos, layout.sin).expand(-1, self._heads, -1, -1)
        mixed_BATv = attend_whole_rows(
            torch.cat([query_BATn, rotate(query_BATr, layout.cos, layout.sin)], dim=-1),
            torch.cat([key_BATn, key_BATr], dim=-1),
            value_BATv,
            layout,
        )
        mixed: Tensor = self.output(mixed_BATv.transpose(1, 2).reshape(batch, length, -1))
        return mixed
