"""Auxiliary losses of the router: peers of the bias, and complements to it. Pure functions.

All balance losses have the form E * sum_i f_i P_i with f the share of choices expert i got (no gradient) and P its mean
normalised score: 1 when perfectly balanced. They differ in the set of tokens f and P are taken over:

| name | f over | P over | source |
|---|---|---|---|
| switch | the micro-batch | the micro-batch | Fedus et al. 2021, arXiv 2101.03961, equation 4 |
| sequence | each sequence | the same sequence | DeepSeek-V3, arXiv 2412.19437, equations 17-20 |
| global_batch | ranks and micro-batches of the step | linear in every sequence | Qiu et al. 2025, arXiv 2501.11873 |

Every function returns one value (or row) a sequence, to be averaged over the global batch: so neither the number of
ranks nor of micro-batches scales a gradient. f of `sequence` is counted from the unbiased scores, as DeepSeek-V3 does.

Where the tokens of a row are spread over ranks (`shards`), f and all numbers of tokens are of the whole row, and the
value is this rank's part of it: a sum over its own tokens.

Shape letters: B sequences of the micro-batch, T positions, E experts, K experts a token uses.
"""

import torch
from torch import Tensor

from moe.sequence_parallel import Shards

_WHOLE = Shards()


def choice_shares(indices_BTK: Tensor, counted_BT: Tensor, num_experts: int, shards: Shards = _WHOLE) -> Tensor:
    """Share of each sequence's choices that went to each expert, float32 [B, E]; rows sum to 1, or 0 without tokens."""
    batch = indices_BTK.shape[0]
    ones_BTK = counted_BT.float().unsqueeze(-1).expand_as(indices_BTK)
    counts_BE = torch.zeros(batch, num_experts, device=indices_BTK.device)
    counts_BE.scatter_add_(1, indices_BTK.flatten(1), ones_BTK.flatten(1))
    counts_BE = shards.sum(counts_BE)
    return counts_BE / counts_BE.sum(dim=1, keepdim=True).clamp(min=1)


def mean_probabilities(scores_BTE: Tensor, counted_BT: Tensor, shards: Shards = _WHOLE) -> Tensor:
    """Mean over a sequence's counted tokens of s_i / sum_j s_j, float32 [B, E]."""
    probabilities_BTE = scores_BTE / (scores_BTE.sum(dim=-1, keepdim=True) + 1e-20)
    kept_BT1 = counted_BT.float().unsqueeze(-1)
    return (probabilities_BTE * kept_BT1).sum(dim=1) / shards.sum(kept_BT1.sum(dim=1)).clamp(min=1)


def sequence_loss(scores_BTE: Tensor, counted_BT: Tensor, top_k: int, shards: Shards = _WHOLE) -> Tensor:
    """E sum_i f_i P_i of each sequence, [B]."""
    indices_BTK = scores_BTE.detach().topk(top_k, dim=-1).indices
    shares_BE = choice_shares(indices_BTK, counted_BT, scores_BTE.shape[-1], shards)
    return scores_BTE.shape[-1] * (shares_BE * mean_probabilities(scores_BTE, counted_BT, shards)).sum(dim=1)


def switch_loss(scores_BTE: Tensor, indices_BTK: Tensor, counted_BT: Tensor, shards: Shards = _WHOLE) -> Tensor:
    """E sum_i f_i P_i of the micro-batch, as the same value for each of its sequences, [B].

    The only one of these that depends on how the global batch is cut: that is its definition.
    """
    num_experts = scores_BTE.shape[-1]
    flat_scores, flat_indices = scores_BTE.flatten(0, 1).unsqueeze(0), indices_BTK.flatten(0, 1).unsqueeze(0)
    flat_counted = counted_BT.flatten().unsqueeze(0)
    shares_1E = choice_shares(flat_indices, flat_counted, num_experts, shards)
    value = num_experts * (shares_1E * mean_probabilities(flat_scores, flat_counted, shards)).sum()
    return value.expand(scores_BTE.shape[0])


def z_loss(logits_BTE: Tensor, counted_BT: Tensor, shards: Shards = _WHOLE) -> Tensor:
    """Mean over a sequence's counted tokens of logsumexp(logits)^2, [B] (Zoph et al. 2022, arXiv 2202.08906)."""
    kept_BT = counted_BT.float()
    total_B = (logits_BTE.logsumexp(dim=-1).square() * kept_BT).sum(dim=1)
    return total_B / shards.sum(kept_BT.sum(dim=1)).clamp(min=1)
