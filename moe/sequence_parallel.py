"""The tokens of a row spread over ranks (Ulysses, Jacobs et al. 2023, arXiv 2309.14509), for rows too long for one.

Consecutive ranks form a group of S. Each is given the whole row and keeps its own T/S tokens; all that works token
by token (norms, projections, experts, head) sees only those. Attention needs whole rows: an all-to-all gives each rank
all tokens of A/S heads, and another one brings the mixed values back to their tokens.

What leaves the model is of whole rows again: token losses are gathered, sums over a row's tokens are added up, and
every rank of the group returns the same. So the loop, the hooks and the objective know nothing of shares, but that S
ranks train on one row. A gathered loss passes its gradient on to its own rank's tokens alone, so the gradients of a
group's ranks are shares that add up, as those of data-parallel ranks do.

`Shards()` is a group of one, in which every method is the identity.

Shape letters: B rows, T tokens of a row, t tokens of a rank's share (T/S), H heads, h heads of a rank (H/S), d width.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Shards:
    """This rank's place in the group that shares rows."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.index = 0 if group is None else dist.get_rank(group)

    def own(self, whole_BT: Tensor, dim: int = 1) -> Tensor:
        """This rank's share of what every rank of the group has whole, a view."""
        return whole_BT if self.size == 1 else whole_BT.chunk(self.size, dim=dim)[self.index]

    def gather(self, own_Bt: Tensor) -> Tensor:
        """Whole rows [B, T] out of all shares; differentiable in this rank's share."""
        if self.size == 1:
            return own_Bt
        whole: Tensor = _Gather.apply(own_Bt, self._group, self.size, self.index)
        return whole

    def sum(self, own: Tensor) -> Tensor:
        """The sum of what each rank has of its tokens; differentiable in this rank's part."""
        if self.size == 1:
            return own
        whole: Tensor = _Sum.apply(own, self._group)
        return whole

    def to_heads(self, own_BHtd: Tensor) -> Tensor:
        """All tokens of this rank's heads, [B, h, T, d]; of fewer heads than ranks, neighbours get the same."""
        if self.size == 1:
            return own_BHtd
        if own_BHtd.shape[1] < self.size:
            own_BHtd = own_BHtd.repeat_interleave(self.size // own_BHtd.shape[1], dim=1)
        by_rank_SBhtd = torch.stack(own_BHtd.chunk(self.size, dim=1))
        return torch.cat(_exchange(by_rank_SBhtd, self._group).unbind(), dim=2)

    def to_tokens(self, own_BhTd: Tensor) -> Tensor:
        """All heads of this rank's tokens, [B, H, t, d]: the way back."""
        if self.size == 1:
            return own_BhTd
        by_rank_SBhtd = torch.stack(own_BhTd.chunk(self.size, dim=2))
        return torch.cat(_exchange(by_rank_SBhtd, self._group).unbind(), dim=1)


def _exchange(by_rank: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    exchanged: Tensor = _AllToAll.apply(by_rank, group)
    return exchanged


class _AllToAll(torch.autograd.Function):
    """Entry i goes to rank i of the group, entry j of the result came from rank j; so does the gradient, backwards."""

    @staticmethod
    def forward(ctx: Any, by_rank: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(by_rank)
        dist.all_to_all_single(received, by_rank, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        returned = torch.empty_like(gradient)
        dist.all_to_all_single(returned, gradient, group=ctx.group)
        return returned, None


class _Gather(torch.autograd.Function):
    """Every rank computes the same with the whole, so each takes the gradient of its own share, once."""

    @staticmethod
    def forward(ctx: Any, own_Bt: Tensor, group: dist.ProcessGroup, size: int, index: int) -> Tensor:
        ctx.size, ctx.index = size, index
        parts = own_Bt.new_empty(size, *own_Bt.shape)
        dist.all_gather_into_tensor(parts, own_Bt.contiguous().unsqueeze(0), group=group)
        return torch.cat(parts.unbind(), dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return gradients[0].chunk(ctx.size, dim=1)[ctx.index], None, None, None


class _Sum(torch.autograd.Function):
    """The same for sums: each rank's part has the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        whole = own.clone()
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
