"""Keeping the documents of a row apart: positions that start again and attention that stops at a border.

A row is a run of documents. `documents_BT` numbers them; what matters here is only where the number changes. Padding
(-1) is a document of its own, so no row of the softmax is ever empty.

On a CPU the mask is an exact one for scaled_dot_product_attention. On CUDA it is a block mask for flex_attention, which
skips the blocks that hold nothing. It is made from the borders alone: its memory grows with the square of the number of
blocks, not of tokens, and its shapes do not depend on the data, so building it waits for nothing.

Shape letters: B samples, T sequence, I blocks of queries, J blocks of keys, A query heads, G key-value heads, d head
width, v width of a value, h rotated pairs.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from moe.sequence_parallel import Shards

BLOCK = 128
"""Tokens of a block, flex_attention's own default."""

AttentionMask = Tensor | BlockMask | None
"""Which earlier tokens a token sees: bool [B, 1, T, T], blocks, or None for all of them."""


class Layout(NamedTuple):
    """What blocks must know about the places of tokens. With rows spread over ranks the angles are of own tokens."""

    cos: Tensor  # [T, h], or [B, 1, T, h] where positions differ between samples
    sin: Tensor
    mask: AttentionMask  # of whole rows
    shards: Shards = Shards()
    real_BT: Tensor | None = None  # False at padding, of own tokens; None if nobody asked for it


def document_layout(
    cos_Th: Tensor, sin_Th: Tensor, documents_BT: Tensor | None, shards: Shards | None = None
) -> Layout:
    """The layout of rows whose documents must not see each other; with None a row is one document."""
    shards = shards or Shards()
    if documents_BT is None:
        return Layout(shards.own(cos_Th, dim=0), shards.own(sin_Th, dim=0), None, shards)
    positions_BT = shards.own(positions_in_documents(documents_BT))
    mask = block_mask(documents_BT) if documents_BT.is_cuda else dense_mask(documents_BT)
    return Layout(cos_Th[positions_BT].unsqueeze(1), sin_Th[positions_BT].unsqueeze(1), mask, shards)


def positions_in_documents(documents_BT: Tensor) -> Tensor:
    """Position of each token in its document's part of the row, int64 [B, T]."""
    index_BT = torch.arange(documents_BT.shape[1], device=documents_BT.device).expand_as(documents_BT)
    is_first_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    is_first_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return index_BT - torch.where(is_first_BT, index_BT, 0).cummax(dim=1).values


def dense_mask(documents_BT: Tensor) -> Tensor:
    """Causal and within one document, bool [B, 1, T, T]."""
    is_same_BTT = documents_BT.unsqueeze(2) == documents_BT.unsqueeze(1)
    return is_same_BTT.tril().unsqueeze(1)


def block_mask(documents_BT: Tensor) -> BlockMask:
    """The same for flex_attention, as `create_block_mask` would make it by way of every score."""

    def within(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents_BT[sample, query] == documents_BT[sample, key])

    length = documents_BT.shape[1]
    first_I = torch.arange(0, length, BLOCK, device=documents_BT.device)
    last_I = (first_I + BLOCK - 1).clamp(max=length - 1)
    opening_BI, closing_BI = documents_BT[:, first_I], documents_BT[:, last_I]
    # Documents are runs of tokens. So an earlier block of keys is seen if the document it closes with opens the block
    # of queries, and all of it by all of them if there is no other document from its first key to their last.
    index_I = torch.arange(len(first_I), device=documents_BT.device)
    is_earlier_IJ = index_I.unsqueeze(1) > index_I
    is_seen_BIJ = (opening_BI.unsqueeze(2) == closing_BI.unsqueeze(1)) & is_earlier_IJ
    is_full_BIJ = (closing_BI.unsqueeze(2) == opening_BI.unsqueeze(1)) & is_earlier_IJ
    is_full_BIJ &= (last_I - first_I == BLOCK - 1).unsqueeze(1)  # a last, shorter block of queries is never full
    is_partial_BIJ = is_seen_BIJ & ~is_full_BIJ | (index_I.unsqueeze(1) == index_I)
    return BlockMask.from_kv_blocks(
        *_listed(is_partial_BIJ), *_listed(is_full_BIJ), BLOCK_SIZE=BLOCK, mask_mod=within, seq_lengths=(length, length)
    )


def _listed(is_there_BIJ: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks a query block has, int32 [B, 1, I], and which, those first, int32 [B, 1, I, J]."""
    is_there_B1IJ = is_there_BIJ.unsqueeze(1).int()
    return is_there_B1IJ.sum(-1).int(), is_there_B1IJ.argsort(dim=-1, descending=True, stable=True).int()


def attend_whole_rows(query_BATd: Tensor, key_BGTd: Tensor, value_BGTv: Tensor, layout: Layout) -> Tensor:
    """`attend` for this rank's tokens, which see those of their row on other ranks, [B, A, T, v]."""
    shards = layout.shards
    query, key, value = (shards.to_heads(tensor) for tensor in (query_BATd, key_BGTd, value_BGTv))
    return shards.to_tokens(attend(query, key, value, layout.mask))


def attend(query_BATd: Tensor, key_BGTd: Tensor, value_BGTv: Tensor, mask: AttentionMask) -> Tensor:
    """Causal attention through the mask, [B, A, T, v]; query heads share the fewer key-value heads."""
    grouped = query_BATd.shape[1] != key_BGTd.shape[1]
    if isinstance(mask, BlockMask):
        # Inside a region that is being compiled it becomes a part of that.
        compiles = query_BATd.is_cuda and not torch.compiler.is_compiling()
        attention = _compiled_flex_attention() if compiles else flex_attention
        mixed: Tensor = attention(query_BATd, key_BGTd, value_BGTv, block_mask=mask, enable_gqa=grouped)
        return mixed
    size, value_size = query_BATd.shape[-1], value_BGTv.shape[-1]
    if size == value_size:
        return F.scaled_dot_product_attention(
            query_BATd, key_BGTd, value_BGTv, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
        )
    # The kernels that keep no T x T scores want one width. Zeros change neither products nor mixtures.
    width = max(size, value_size)
    query_BATw, key_BGTw, value_BGTw = (
        F.pad(tensor, (0, width - tensor.shape[-1])) for tensor in (query_BATd, key_BGTd, value_BGTv)
    )
    mixed_BATw = F.scaled_dot_product_attention(
        query_BATw, key_BGTw, value_BGTw, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped, scale=size**-0.5
    )
    return mixed_BATw[..., :value_size]


@cache
def _compiled_flex_attention() -> Any:
    # Uncompiled it computes every score, masked or not.
    return torch.compile(flex_attention)
