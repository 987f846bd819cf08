"""A decoder-only language model with routed and shared experts, in plain torch.

Decisions:
- `model(tokens, labels)` returns the cross-entropy of each token, not a mean: what the batch averages over, and
  with which weights, is the loop's business.
- Expert loads are values that blocks return, added up outside the recomputed regions. Recomputation therefore
  cannot count twice. Training loads are taken only when gradients are on, so that a scoring pass counts nothing.
- Padding (label -100) is routed like any token but not counted.

Shape letters: B samples, T sequence, N tokens (B*T), D model width, E experts, L MoE layers, V vocabulary.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.config import LOSS_CHUNK, ModelConfig
from moe.experts import Experts
from moe.layers import Attention, FeedForward, RMSNorm, rotary_table
from moe.router import Router, count_tokens

IGNORED_LABEL = -100

CountKind = Literal["train", "eval"]


class MoELayer(nn.Module):
    """Router, routed experts and shared experts in place of a feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        shared = config.num_shared_experts * config.expert_intermediate_size
        self.shared = FeedForward(config.hidden_size, shared) if shared else None

    @property
    def num_experts(self) -> int:
        return self.router.num_experts

    @property
    def top_k(self) -> int:
        return self.router.top_k

    def forward(self, x_BTD: Tensor, counted_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Output [B, T, D] and the load of each expert, int64 [E]."""
        x_ND = x_BTD.flatten(0, 1)
        indices_NK, gates_NK = self.router(x_ND)
        y_ND = self.experts(x_ND, indices_NK, gates_NK)
        if self.shared is not None:
            y_ND = y_ND + self.shared(x_ND)
        return y_ND.view_as(x_BTD), count_tokens(indices_NK, counted_BT.flatten(), self.num_experts)


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, *, sparse: bool) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MoELayer(config) if sparse else FeedForward(config.hidden_size, config.dense_intermediate_size)
        self._dropout = config.dropout

    def forward(
        self, x_BTD: Tensor, cos_Th: Tensor, sin_Th: Tensor, counted_BT: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states [B, T, D] and the experts' loads int64 [E], or None for a dense block."""
        mixed_BTD = self.attention(self.attention_norm(x_BTD), cos_Th, sin_Th)
        x_BTD = x_BTD + F.dropout(mixed_BTD, self._dropout, self.training)
        normed_BTD = self.mlp_norm(x_BTD)
        counts_E = None
        if isinstance(self.mlp, MoELayer):
            out_BTD, counts_E = self.mlp(normed_BTD, counted_BT)
        else:
            out_BTD = self.mlp(normed_BTD)
        return x_BTD + F.dropout(out_BTD, self._dropout, self.training), counts_E


class MoEDecoder(nn.Module):
    """The language model. Initial weights are drawn from torch's global generator: seed it before."""

    def __init__(self, config: ModelConfig, *, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            Block(config, sparse=index >= config.num_dense_layers) for index in range(config.num_layers)
        )
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self._counts: dict[CountKind, list[Tensor]] = {"train": [], "eval": []}
        self._initialize()

    def forward(self, tokens_BT: Tensor, labels_BT: Tensor | None = None) -> Tensor:
        """Logits [B, T, V]; with labels, the cross-entropy of each token, float32 [B, T], 0 where the label is -100."""
        hidden_BTD = self._hidden(tokens_BT, labels_BT)
        if labels_BT is None:
            logits_BTV: Tensor = self.head(hidden_BTD)
            return logits_BTV
        return self._token_losses(hidden_BTD.flatten(0, 1), labels_BT.flatten()).view_as(labels_BT)

    def moe_layers(self) -> list[MoELayer]:
        """The layers with routed experts, in the order the data meets them."""
        return [block.mlp for block in self.blocks if isinstance(block.mlp, MoELayer)]

    def take_counts(self, kind: CountKind) -> list[Tensor]:
        """Loads of every MoE layer on this rank since the last call, int64 [E] each; then zero.

        `train` counts forwards in training mode with gradients on, `eval` those in evaluation mode.
        """
        counts = self._counts[kind] or [
            torch.zeros(layer.num_experts, dtype=torch.int64, device=layer.router.weight.device)
            for layer in self.moe_layers()
        ]
        self._counts[kind] = []
        return counts

    def _hidden(self, tokens_BT: Tensor, labels_BT: Tensor | None) -> Tensor:
        config = self.config
        x_BTD = self.embedding(tokens_BT)
        cos_Th, sin_Th = rotary_table(tokens_BT.shape[1], config.rotary_size, config.rope_theta, tokens_BT.device)
        counted_BT = torch.ones_like(tokens_BT, dtype=torch.bool) if labels_BT is None else labels_BT != IGNORED_LABEL
        recompute = config.activation_recompute == "block" and self.training and torch.is_grad_enabled()
        counts: list[Tensor] = []
        for block in self.blocks:
            if recompute:
                x_BTD, counts_E = checkpoint(block, x_BTD, cos_Th, sin_Th, counted_BT, use_reentrant=False)
            else:
                x_BTD, counts_E = block(x_BTD, cos_Th, sin_Th, counted_BT)
            if counts_E is not None:
                counts.append(counts_E)
        self._add_counts(counts)
        normed_BTD: Tensor = self.final_norm(x_BTD)
        return normed_BTD

    def _add_counts(self, counts: list[Tensor]) -> None:
        if self.training and not torch.is_grad_enabled():
            return
        kind: CountKind = "train" if self.training else "eval"
        before = self._counts[kind]
        self._counts[kind] = [old + new for old, new in zip(before, counts, strict=True)] if before else counts

    def _token_losses(self, hidden_ND: Tensor, labels_N: Tensor) -> Tensor:
        def chunk_losses(hidden: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(self.head(hidden).float(), labels, ignore_index=IGNORED_LABEL, reduction="none")

        if hidden_ND.shape[0] <= LOSS_CHUNK:
            return chunk_losses(hidden_ND, labels_N)
        # Float32 logits of all tokens would be the largest tensor of the step: keep none, recompute each chunk.
        return torch.cat(
            [
                checkpoint(chunk_losses, hidden, labels, use_reentrant=False)
                for hidden, labels in zip(hidden_ND.split(LOSS_CHUNK), labels_N.split(LOSS_CHUNK), strict=True)
            ]
        )

    @torch.no_grad()
    def _initialize(self) -> None:
        std, residual_std = self.config.init_std, self.config.init_std / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim > 1:
                into_residual = name.endswith(("attention.output.weight", "down", "down.weight"))
                parameter.normal_(std=residual_std if into_residual else std)
