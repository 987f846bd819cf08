"""The blocks of the decoder: attention and feed-forward or experts, and the block that predicts a token further.

A block returns what its experts observed instead of keeping it: a block that is recomputed cannot count twice.

Shape letters: B samples, T sequence, N tokens (B*T), D model width, E experts, K experts a token uses, S samples whose
loads are counted.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.attention import build_attention
from moe.aux_losses import mean_probabilities, sequence_loss, switch_loss, z_loss
from moe.config import ModelConfig
from moe.documents import Layout
from moe.experts import Experts
from moe.layers import FeedForward, RMSNorm
from moe.router import Router, Routing, RoutingStats, count_by_sample
from moe.sequence_parallel import Shards


class LayerReport(NamedTuple):
    """What an MoE layer has to say besides its output."""

    stats: RoutingStats
    penalty_B: Tensor | None
    """Auxiliary losses that are known at once, weighted, for each sample; of spread rows, this rank's part."""
    probabilities_BE: Tensor | None
    """Mean normalised score of each expert, for the loss over the global batch."""


class Samples(NamedTuple):
    """Which sample each token of a micro-batch belongs to, where loads are counted by sample."""

    of_token_N: Tensor  # int64, -1 for tokens that are not counted
    number: int


class MoELayer(nn.Module):
    """Router, routed experts and shared experts in place of a feed-forward."""

    def __init__(self, config: ModelConfig, *, parallel_size: int) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config, parallel_size=parallel_size)
        self._aux = config.aux_loss
        shared = config.num_shared_experts * config.expert_intermediate_size
        self.shared = FeedForward(config.hidden_size, shared) if shared else None

    @property
    def num_experts(self) -> int:
        return self.router.num_experts

    @property
    def top_k(self) -> int:
        return self.router.top_k

    def forward(
        self,
        x_BTD: Tensor,
        counted_BT: Tensor,
        samples: Samples | None = None,
        shards: Shards | None = None,
        real_BT: Tensor | None = None,
    ) -> tuple[Tensor, LayerReport]:
        """Output [B, T, D] and what the layer observed, of this rank's tokens if `shards` spread rows over ranks.

        `real_BT`: False at padding, for a router with a capacity.
        """
        x_ND = x_BTD.flatten(0, 1)
        routing = self.router(x_ND, counted_BT.flatten(), None if real_BT is None else real_BT.flatten())
        if samples is not None:
            counts_SE = count_by_sample(routing.indices_NK, samples.of_token_N, samples.number, self.num_experts)
            routing = routing._replace(stats=routing.stats._replace(by_sample_SE=counts_SE))
        y_ND = self.experts(x_ND, routing.indices_NK, routing.gates_NK)
        if self.shared is not None:
            y_ND = y_ND + self.shared(x_ND)
        return y_ND.view_as(x_BTD), self._report(routing, counted_BT, shards or Shards())

    def _report(self, routing: Routing, counted_BT: Tensor, shards: Shards) -> LayerReport:
        aux = self._aux
        if not (self.training and aux.any):
            return LayerReport(routing.stats, None, None)
        scores_BTE, logits_BTE, indices_BTK = (
            tensor.unflatten(0, counted_BT.shape)
            for tensor in (routing.scores_NE, routing.logits_NE, routing.indices_NK)
        )
        penalty_B = scores_BTE.new_zeros(counted_BT.shape[0])
        if aux.switch:
            penalty_B = penalty_B + aux.switch * switch_loss(scores_BTE, indices_BTK, counted_BT, shards)
        if aux.sequence:
            penalty_B = penalty_B + aux.sequence * sequence_loss(scores_BTE, counted_BT, self.top_k, shards)
        if aux.z:
            penalty_B = penalty_B + aux.z * z_loss(logits_BTE, counted_BT, shards)
        probabilities_BE = mean_probabilities(scores_BTE, counted_BT, shards) if aux.global_batch else None
        return LayerReport(routing.stats, penalty_B, probabilities_BE)


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, *, num_experts: int, parallel_size: int) -> None:
        """`num_experts`: routed experts of this block; 0 makes it dense."""
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = build_attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = (
            MoELayer(config.with_experts(num_experts), parallel_size=parallel_size)
            if num_experts
            else FeedForward(config.hidden_size, config.dense_intermediate_size)
        )
        self._dropout = config.dropout

    def forward(
        self, x_BTD: Tensor, layout: Layout, counted_BT: Tensor, samples: Samples | None = None
    ) -> tuple[Tensor, LayerReport | None]:
        """Hidden states [B, T, D] and the MoE layer's report, or None for a dense block."""
        x_BTD, normed_BTD = self.mix(x_BTD, layout)
        report = None
        if isinstance(self.mlp, MoELayer):
            out_BTD, report = self.mlp(normed_BTD, counted_BT, samples, layout.shards, layout.real_BT)
        else:
            out_BTD = self.mlp(normed_BTD)
        return x_BTD + F.dropout(out_BTD, self._dropout, self.training), report

    def mix(self, x_BTD: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """The residual stream after attention, and normalised for what follows, both [B, T, D]."""
        mixed_BTD = self.attention(self.attention_norm(x_BTD), layout)
        x_BTD = x_BTD + F.dropout(mixed_BTD, self._dropout, self.training)
        return x_BTD, self.mlp_norm(x_BTD)


class NextTokenBlock(nn.Module):
    """Predicts the token after the next: one more block on the hidden state and the embedding of the next token.

    h'_t = block(M [norm(h_t); norm(Emb(token_{t+1}))]), with the model's own embedding and head
    (DeepSeek-V3, arXiv 2412.19437, section 2.2, with depth 1).
    """

    def __init__(self, config: ModelConfig, *, parallel_size: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.hidden_norm = RMSNorm(width, config.norm_eps)
        self.embedding_norm = RMSNorm(width, config.norm_eps)
        self.merge = nn.Linear(2 * width, width, bias=False)
        self.block = Block(config, num_experts=config.num_experts, parallel_size=parallel_size)
        self.final_norm = RMSNorm(width, config.norm_eps)

    def forward(
        self,
        hidden_BTD: Tensor,
        next_BTD: Tensor,
        layout: Layout,
        counted_BT: Tensor,
        samples: Samples | None = None,
    ) -> tuple[Tensor, LayerReport]:
        """Hidden states to predict token t+2 from, [B, T, D], and the MoE layer's report."""
        merged_BTD = self.merge(torch.cat([self.hidden_norm(hidden_BTD), self.embedding_norm(next_BTD)], dim=-1))
        out_BTD, report = self.block(merged_BTD, layout, counted_BT, samples)
        assert report is not None
        return self.final_norm(out_BTD), report
