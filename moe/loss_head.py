"""The output head: logits, or the cross-entropy of each token; of a large vocabulary without ever holding its logits.

Decisions:
- A small vocabulary's logits are worked on in place, from logits to exponentials to their own gradient: one tensor of
  that size where autograd, left alone, has three at once.
- Tiles of a large vocabulary, not chunks of tokens: a tile of the weight's gradient is then one product over all
  tokens, written once. The sums run as in the plain head's gradient, and nothing of size [V, D] is added to again.
- Of tiles the forward keeps only each token's largest logit and the sum of exponentials below it; the backward makes
  each tile's logits again. The price is a fourth product of [N, D] and [V, D] beside the plain head's three.
- Either way any gradient of the token losses is exact, also one that is known long after the forward: the weights of
  samples, documents or tokens.
- Types are those of the plain head: products in the parameters' type, softmax in float32, gradients of the parameters
  rounded once to their type. The gradient of the hidden states is added up over tiles in float32.
- torch's own `linear_cross_entropy` (2.13) cuts tokens instead, and returns the losses of bf16 models in bf16, which is
  too coarse to weigh samples by.

Shape letters: N tokens, D model width, V vocabulary, t tile of the vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

IGNORED_LABEL = -100

WHOLE_BYTES = 2**26
"""Float32 logits of a micro-batch up to this size are made at once, unless the configuration says otherwise."""
TILE_BYTES = 2**23
"""Size of a float32 tile that is chosen by itself: passes over it find it in a CPU's cache."""

_SMALLEST_TILE = 1024  # below it products no longer fill a GPU


def tile_size(configured: int, tokens: int, vocab_size: int) -> int:
    """Vocabulary entries whose logits exist at once; `vocab_size` where all of them do.

    `configured`: `loss_tile` of the model's configuration, 0 chooses by memory.
    """
    if configured:
        return min(configured, vocab_size)
    if 4 * tokens * vocab_size <= WHOLE_BYTES:
        return vocab_size
    fitting = TILE_BYTES // (4 * tokens) // _SMALLEST_TILE * _SMALLEST_TILE
    return min(max(fitting, _SMALLEST_TILE), vocab_size)


class OutputHead(nn.Linear):
    """Hidden states to logits or, given labels, to losses.

    The loss is part of the module's forward, so that whoever gathers parameters around it (ZeRO 3) also sees the loss.
    """

    def __init__(self, width: int, vocab_size: int, *, loss_tile: int) -> None:
        super().__init__(width, vocab_size, bias=False)
        self._loss_tile = loss_tile

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits [..., V]; with labels [...], the cross-entropy of each token, float32 [...], 0 where it is -100."""
        if labels is None:
            return F.linear(hidden, self.weight)
        hidden_ND, labels_N = hidden.flatten(0, -2), labels.flatten()
        tile = tile_size(self._loss_tile, len(labels_N), len(self.weight))
        if tile < len(self.weight):
            return tiled_cross_entropy(hidden_ND, self.weight, labels_N, tile).float().view_as(labels)
        return whole_cross_entropy(hidden_ND, self.weight, labels_N).float().view_as(labels)


def whole_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Cross-entropy of each token, [N] in float32 (float64 for float64), 0 where the label is -100.

    Differentiable once, and backward through once: the backward turns the logits into their gradient where they lie.
    """
    losses_N: Tensor = _WholeCrossEntropy.apply(hidden_ND, weight_VD, labels_N)
    return losses_N


def tiled_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, tile: int) -> Tensor:
    """Cross-entropy of each token, [N] in float32 (float64 for float64), 0 where the label is -100.

    Differentiable once in hidden states and weight.
    """
    losses_N: Tensor = _TiledCrossEntropy.apply(hidden_ND, weight_VD, labels_N, tile)
    return losses_N


class _WholeCrossEntropy(torch.autograd.Function):
    """Holds one tensor of the logits' size, in float32, from forward to backward, and works on it in place."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        logits_NV = (hidden_ND @ weight_VD.t()).to(wide)
        target_N = logits_NV.gather(1, labels_N.clamp(min=0).unsqueeze(1)).squeeze(1)
        largest_N = logits_NV.amax(dim=1)
        sum_N = logits_NV.sub_(largest_N.unsqueeze(1)).exp_().sum(dim=1)
        ctx.save_for_backward(hidden_ND, weight_VD, labels_N, logits_NV, sum_N)  # exponentials by now
        return (sum_N.log() - (target_N - largest_N)).masked_fill_(labels_N == IGNORED_LABEL, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # A second backward through the same logits is an error of autograd's: they are overwritten here.
        hidden_ND, weight_VD, labels_N, exponentials_NV, sum_N = ctx.saved_tensors
        gradient_N = gradients[0].to(sum_N.dtype).masked_fill(labels_N == IGNORED_LABEL, 0)
        # dl/dlogit = softmax - one at the label.
        d_logits_NV = exponentials_NV.mul_((gradient_N / sum_N).unsqueeze(1))
        d_logits_NV.scatter_add_(1, labels_N.clamp(min=0).unsqueeze(1), -gradient_N.unsqueeze(1))
        narrow_NV = d_logits_NV.to(weight_VD.dtype)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        return (
            narrow_NV @ weight_VD if needs_hidden else None,
            narrow_NV.t() @ hidden_ND if needs_weight else None,
            None,
        )


class _TiledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, tile: int) -> Tensor:
        tiles = _LogitTiles(hidden_ND, weight_VD, labels_N, tile)
        largest_N = hidden_ND.new_full(labels_N.shape, -torch.inf, dtype=tiles.wide)
        sum_N, target_N = torch.zeros_like(largest_N), torch.zeros_like(largest_N)
        for start, rows_tD in tiles:
            logits_Nt = tiles.logits(rows_tD)
            at_N1, inside_N = tiles.labels_in(start, rows_tD)
            target_N = torch.where(inside_N, logits_Nt.gather(1, at_N1).squeeze(1), target_N)
            before_N, largest_N = largest_N, torch.maximum(largest_N, logits_Nt.amax(dim=1))
            sum_N *= (before_N - largest_N).exp_()
            sum_N += logits_Nt.sub_(largest_N.unsqueeze(1)).exp_().sum(dim=1)
        ctx.save_for_backward(hidden_ND, weight_VD, labels_N, largest_N, sum_N)
        ctx.tile = tile
        return (sum_N.log() - (target_N - largest_N)).masked_fill_(labels_N == IGNORED_LABEL, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, labels_N, largest_N, sum_N = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        tiles = _LogitTiles(hidden_ND, weight_VD, labels_N, ctx.tile)
        gradient_N = gradients[0].to(tiles.wide).masked_fill(labels_N == IGNORED_LABEL, 0)
        scale_N1 = (gradient_N / sum_N).unsqueeze(1)
        d_hidden_ND = torch.zeros_like(hidden_ND, dtype=tiles.wide) if needs_hidden else None
        d_weight_VD = torch.empty_like(weight_VD) if needs_weight else None
        for start, rows_tD in tiles:
            # dl/dlogit = softmax - one at the label, in place of the logits.
            d_logits_Nt = tiles.logits(rows_tD).sub_(largest_N.unsqueeze(1)).exp_().mul_(scale_N1)
            at_N1, inside_N = tiles.labels_in(start, rows_tD)
            d_logits_Nt.scatter_add_(1, at_N1, torch.where(inside_N, -gradient_N, 0).unsqueeze(1))
            narrow_Nt = d_logits_Nt.to(weight_VD.dtype)
            if d_weight_VD is not None:
                torch.mm(narrow_Nt.t(), hidden_ND, out=d_weight_VD[start : start + len(rows_tD)])
            if d_hidden_ND is None:
                continue
            if d_hidden_ND.dtype == narrow_Nt.dtype:
                d_hidden_ND.addmm_(narrow_Nt, rows_tD)
            else:
                d_hidden_ND += narrow_Nt @ rows_tD
        d_hidden = None if d_hidden_ND is None else d_hidden_ND.to(hidden_ND.dtype)
        return d_hidden, d_weight_VD, None, None


class _LogitTiles:
    """The tiles of a weight in turn, with one buffer for the logits of whichever is at work."""

    def __init__(self, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, tile: int) -> None:
        self.wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        self._hidden_ND, self._weight_VD, self._labels_N, self._tile = hidden_ND, weight_VD, labels_N, tile
        self._buffer = hidden_ND.new_empty(len(hidden_ND) * tile)

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        starts = range(0, len(self._weight_VD), self._tile)
        return zip(starts, self._weight_VD.split(self._tile), strict=True)

    def logits(self, rows_tD: Tensor) -> Tensor:
        """Logits of a tile, [N, t]; the caller may overwrite them, the next tile will."""
        logits_Nt = self._buffer[: len(self._hidden_ND) * len(rows_tD)].view(-1, len(rows_tD))
        torch.mm(self._hidden_ND, rows_tD.t(), out=logits_Nt)
        return logits_Nt.to(self.wide)

    def labels_in(self, start: int, rows_tD: Tensor) -> tuple[Tensor, Tensor]:
        """Where in the tile each label lies, int64 [N, 1], and whether it does, bool [N]; without waiting for a GPU."""
        at_N = self._labels_N - start
        inside_N = (at_N >= 0) & (at_N < len(rows_tD))
        return at_N.clamp(0, len(rows_tD) - 1).unsqueeze(1), inside_N
