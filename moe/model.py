"""A decoder-only language model with routed and shared experts, in plain torch.

Decisions:
- `model(tokens, labels)` returns the cross-entropy of each token, not a mean: what the batch averages over, and
  with which weights, is the loop's business.
- Expert loads are values that blocks return, added up outside the recomputed regions. Recomputation therefore
  cannot count twice. Training loads are taken only when gradients are on, so that a scoring pass counts nothing.
- A token without a target (label -100: padding, and the last of a document where documents are kept apart) is routed
  like any other but not counted.
- Auxiliary losses leave the model as a linear form, features of each sample and coefficients that may depend on the
  loads of the whole step: so a loss over the global batch is exact although no micro-batch ever sees that batch.
- Rows may be spread over ranks (moe/sequence_parallel.py). Whole rows go in and whole rows of losses come out; between
  them B x T stands for this rank's share.

Shape letters: B samples, T sequence, N tokens (B*T), D model width, E experts, K experts a token uses, L MoE layers,
V vocabulary, X features of the auxiliary losses, Y statistics they need of the whole step.
"""

import math
from collections.abc import Iterator
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.blocks import Block, LayerReport, MoELayer, NextTokenBlock, Samples
from moe.compiled import compile_regions
from moe.config import ModelConfig
from moe.documents import Layout, document_layout
from moe.experts import Experts
from moe.layers import FeedForward, RMSNorm, rotary_table
from moe.loss_head import IGNORED_LABEL, OutputHead
from moe.router import THRESHOLD_BINS, Router, RoutingStats
from moe.sequence_parallel import Shards
from trainer.phases import cut

CountKind = Literal["train", "eval"]


class MoEDecoder(nn.Module):
    """The language model. Initial weights are drawn from torch's global generator: seed it before, alike on all ranks.

    With `expert_parallel_size` P > 1 this rank builds share `expert_parallel_rank` of every layer's experts; before the
    first forward it must be given its process group with `join_expert_group`. All initial weights are the same as with
    P = 1.
    """

    def __init__(
        self, config: ModelConfig, *, vocab_size: int, expert_parallel_size: int = 1, expert_parallel_rank: int = 0
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            Block(config, num_experts=experts, parallel_size=expert_parallel_size)
            for experts in config.block_experts[: config.num_layers]
        )
        self.next_token = NextTokenBlock(config, parallel_size=expert_parallel_size) if config.has_mtp else None
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = OutputHead(config.hidden_size, vocab_size, loss_tile=config.loss_tile)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self._stats: dict[CountKind, list[RoutingStats]] = {"train": [], "eval": []}
        self._samples_per_row = 0
        self.shards = Shards()
        if config.activation_recompute == "selective":
            for module in self.modules():
                if isinstance(module, (RMSNorm, FeedForward, Router, Experts)):
                    module.remakes = True
        self._initialize(expert_parallel_size, expert_parallel_rank)
        if config.compile:
            compile_regions(self)

    penalty_name = "moe/aux_loss"
    """Metric under which the loop reports the auxiliary losses."""

    @property
    def needs_whole_step(self) -> bool:
        """True if the auxiliary losses need the loads of the whole step before any backward."""
        return bool(self.config.aux_loss.global_batch)

    def forward(
        self, tokens_BT: Tensor, labels_BT: Tensor | None = None, documents_BT: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Logits [B, T, V]; with labels, the cross-entropy of each token, float32 [B, T], 0 where the label is -100.

        Where rows are spread over ranks all of this is of whole rows but the logits, which are of own tokens.

        `documents_BT`: number of the document each token belongs to, -1 for padding. With `document_mask` attention and
        positions stay inside a document; without documents a row is one.
        In training with auxiliary losses: also their features [B, X] and statistics [Y]. The term to add to the loss is
        the mean over the global batch of features @ penalty_coefficients(statistics summed over the step).
        """
        own = self.shards.own
        layout, counted_BT = self._layout(tokens_BT, labels_BT, documents_BT)
        samples = self._samples(counted_BT, documents_BT) if self.training and self._samples_per_row else None
        counted_BT = own(counted_BT)
        x_BTD, reports = self._hidden(own(tokens_BT), layout, counted_BT, samples)
        hidden_BTD = self.final_norm(cut("head", x_BTD))
        if labels_BT is None:
            self._add_stats([report.stats for report in reports])
            logits_BTV: Tensor = self.head(hidden_BTD)
            return logits_BTV
        losses_BT = self.shards.gather(self.head(hidden_BTD, own(labels_BT)))
        penalties = []
        if self.next_token is not None and self.training:
            targets_BT = self._targets_after_next(labels_BT, documents_BT)
            next_losses_B, report = self._next_token_losses(x_BTD, labels_BT, targets_BT, layout, counted_BT, samples)
            penalties.append(self.config.mtp_weight * next_losses_B)
            reports.append(report)
        self._add_stats([report.stats for report in reports])
        penalties += [report.penalty_B for report in reports if report.penalty_B is not None]
        if not penalties:
            return losses_BT
        features = [torch.stack(penalties).sum(0).unsqueeze(1)]
        features += [report.probabilities_BE for report in reports if report.probabilities_BE is not None]
        features_BX = self.shards.sum(torch.cat(features, dim=1))
        return losses_BT, features_BX, torch.cat([report.stats.counts_E for report in reports])

    def penalty_coefficients(self, statistics_Y: Tensor | None) -> Tensor:
        """Coefficients of the auxiliary losses' features, float32 [X].

        `statistics_Y`: loads of all layers summed over the step's micro-batches and ranks; None will do unless
        `needs_whole_step`.
        """
        parts = [torch.ones(1, device=self.head.weight.device)]
        if self.needs_whole_step:
            assert statistics_Y is not None
            for counts_E in statistics_Y.split([layer.num_experts for layer in self.moe_layers()]):
                share_E = counts_E / counts_E.sum().clamp(min=1)
                parts.append(self.config.aux_loss.global_batch * counts_E.numel() * share_E)
        return torch.cat(parts)

    def moe_layers(self) -> list[MoELayer]:
        """The layers with routed experts, in the order the data meets them; that of multi-token prediction last."""
        blocks = [*self.blocks, *([self.next_token.block] if self.next_token is not None else [])]
        return [block.mlp for block in blocks if isinstance(block.mlp, MoELayer)]

    def timed_parts(self) -> Iterator[tuple[str, nn.Module]]:
        """Names of modules for a breakdown of the step's time (trainer/breakdown.py)."""
        yield "embedding", self.embedding
        if self.next_token is not None:
            yield "next_token", self.next_token
        for block in [*self.blocks, *([self.next_token.block] if self.next_token is not None else [])]:
            yield "norm", block.attention_norm
            yield "attention", block.attention
            yield "norm", block.mlp_norm
            if isinstance(block.mlp, MoELayer):
                yield "router", block.mlp.router
                yield "dispatch", block.mlp.experts  # up to the cut that follows in moe/grouped.py
                if block.mlp.shared is not None:
                    yield "shared", block.mlp.shared
            else:
                yield "dense", block.mlp

    def join_expert_group(self, group: dist.ProcessGroup) -> None:
        """Give every layer the ranks that hold the other shares of its experts."""
        for layer in self.moe_layers():
            layer.experts.group = group

    def join_sequence_group(self, group: dist.ProcessGroup) -> None:
        """From now on share every row with the ranks of `group`: all must be given the same rows, in the same order."""
        self.shards = Shards(group)

    def count_by_sample(self, samples_per_row: int) -> None:
        """From now on count training loads of each sample too: a row, or each of a row's documents in their order."""
        self._samples_per_row = samples_per_row

    def take_loads(self, kind: CountKind) -> list[RoutingStats]:
        """Loads of every MoE layer on this rank since the last call; then zero.

        `train` adds up forwards in training mode with gradients on, `eval` those in evaluation mode.
        """
        taken, self._stats[kind] = self._stats[kind], []
        return taken or [_no_stats(layer, kind) for layer in self.moe_layers()]

    def take_counts(self, kind: CountKind) -> list[Tensor]:
        """The counts of `take_loads`, int64 [E] for each layer."""
        return [stats.counts_E for stats in self.take_loads(kind)]

    def _layout(
        self, tokens_BT: Tensor, labels_BT: Tensor | None, documents_BT: Tensor | None
    ) -> tuple[Layout, Tensor]:
        """Places of the tokens, and which tokens of whole rows are counted, bool [B, T]."""
        config = self.config
        cos_Th, sin_Th = rotary_table(tokens_BT.shape[1], config.rotary_size, config.rope_theta, tokens_BT.device)
        layout = document_layout(cos_Th, sin_Th, documents_BT if config.document_mask else None, self.shards)
        if config.capacity_factor and documents_BT is not None:
            layout = layout._replace(real_BT=self.shards.own(documents_BT >= 0))
        return layout, torch.ones_like(tokens_BT, dtype=torch.bool) if labels_BT is None else labels_BT != IGNORED_LABEL

    def _samples(self, counted_BT: Tensor, documents_BT: Tensor | None) -> Samples:
        """Rows, or the documents of each row in turn, as samples (as in trainer/objective.py)."""
        batch, per_row = len(counted_BT), self._samples_per_row
        of_token_BT = torch.arange(batch, device=counted_BT.device).unsqueeze(1) * per_row
        if per_row > 1:
            assert documents_BT is not None
            is_new_BT = F.pad(documents_BT[:, 1:] != documents_BT[:, :-1], (1, 0), value=False)
            of_token_BT = of_token_BT + is_new_BT.long().cumsum(1).clamp(max=per_row - 1)
        of_token_BT = self.shards.own(of_token_BT.expand_as(counted_BT).where(counted_BT, -1))
        return Samples(of_token_BT.flatten(), batch * per_row)

    def _hidden(
        self, tokens_BT: Tensor, layout: Layout, counted_BT: Tensor, samples: Samples | None = None
    ) -> tuple[Tensor, list[LayerReport]]:
        config = self.config
        x_BTD = self.embedding(tokens_BT)
        recompute = config.activation_recompute == "block" and self.training and torch.is_grad_enabled()
        reports: list[LayerReport] = []
        for block in self.blocks:
            if recompute:
                x_BTD, report = checkpoint(block, x_BTD, layout, counted_BT, samples, use_reentrant=False)
            else:
                x_BTD, report = block(x_BTD, layout, counted_BT, samples)
            if report is not None:
                reports.append(report)
        return x_BTD, reports

    def _targets_after_next(self, labels_BT: Tensor, documents_BT: Tensor | None) -> Tensor:
        """The token after the next, int64 [B, T]; -100 where there is none, or where a document must not see it."""
        targets_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED_LABEL)
        if documents_BT is None or not self.config.document_mask:
            return targets_BT
        follows_BT = F.pad(documents_BT[:, 1:] == documents_BT[:, :-1], (0, 1), value=False)
        return targets_BT.where(follows_BT, IGNORED_LABEL)

    def _next_token_losses(
        self,
        x_BTD: Tensor,
        labels_BT: Tensor,
        targets_BT: Tensor,
        layout: Layout,
        counted_BT: Tensor,
        samples: Samples | None = None,
    ) -> tuple[Tensor, LayerReport]:
        """Mean loss of each sample in predicting the token after the next, [B], and the MoE layer's report.

        Labels and targets are of whole rows; of spread rows the mean is this rank's part, a sum over own tokens.
        """
        assert self.next_token is not None
        next_BTD = self.embedding(self.shards.own(labels_BT).clamp(min=0))
        if self.config.activation_recompute == "block" and torch.is_grad_enabled():
            hidden_BTD, report = checkpoint(
                self.next_token, x_BTD, next_BTD, layout, counted_BT, samples, use_reentrant=False
            )
        else:
            hidden_BTD, report = self.next_token(x_BTD, next_BTD, layout, counted_BT, samples)
        num_targets_B = (targets_BT != IGNORED_LABEL).sum(dim=1).clamp(min=1)
        return self.head(hidden_BTD, self.shards.own(targets_BT)).sum(dim=1) / num_targets_B, report

    def _add_stats(self, new: list[RoutingStats]) -> None:
        if self.training and not torch.is_grad_enabled():
            return
        kind: CountKind = "train" if self.training else "eval"
        # Multi-token prediction is trained only: to an evaluation its layer adds nothing.
        new = new + [_no_stats(layer, kind) for layer in self.moe_layers()[len(new) :]]
        old = self._stats[kind]
        self._stats[kind] = [_add(a, b) for a, b in zip(old, new, strict=True)] if old else new

    @torch.no_grad()
    def _initialize(self, parallel_size: int, parallel_rank: int) -> None:
        std, residual_std = self.config.init_std, self.config.init_std / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim > 1:
                into_residual = name.endswith(("attention.output.weight", "down", "down.weight"))
                # A share of the experts is cut out of the whole draw, so that sharding changes no initial weight.
                shards = 1 if getattr(parameter, "allreduce", True) else parallel_size
                drawn = parameter if shards == 1 else parameter.new_empty(shards * len(parameter), *parameter.shape[1:])
                drawn.normal_(std=residual_std if into_residual else std)
                if shards > 1:
                    parameter.copy_(drawn.chunk(shards)[parallel_rank])


def _add(a: RoutingStats, b: RoutingStats) -> RoutingStats:
    thresholds_EQ = None if a.thresholds_EQ is None or b.thresholds_EQ is None else a.thresholds_EQ + b.thresholds_EQ
    by_sample_SE = (
        None if a.by_sample_SE is None or b.by_sample_SE is None else torch.cat([a.by_sample_SE, b.by_sample_SE])
    )
    return RoutingStats(a.counts_E + b.counts_E, a.dropped + b.dropped, thresholds_EQ, by_sample_SE)


def _no_stats(layer: MoELayer, kind: CountKind) -> RoutingStats:
    # The same tensors that a forward gives: a rank that saw no batch must add zeros to what the others sum.
    zeros_E = torch.zeros(layer.num_experts, dtype=torch.int64, device=layer.router.weight.device)
    thresholds_EQ = (
        zeros_E.new_zeros(layer.num_experts, THRESHOLD_BINS)
        if kind == "train" and layer.router.collects_thresholds
        else None
    )
    return RoutingStats(zeros_E, zeros_E.new_zeros(()), thresholds_EQ)
