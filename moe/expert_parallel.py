"""Experts spread over ranks: tokens travel to their experts and back by all-to-all.

A rank of an expert group of size P holds E / P experts, in order. Each forward sorts its token copies by expert, tells
the others how many come, sends them, runs its own experts on what arrives, and sends the results back the same way; the
backward of each exchange is the reverse exchange. Loads may be uneven or zero, and a rank may get no token at all. The
sizes of an exchange must be known on the host: one wait for the device a forward, in this path only.

Shape letters: N tokens of this rank, R rows that arrive, D model width, E experts, e experts of this rank, K experts a
token uses, P ranks of the expert group.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe.grouped import grouped_swiglu, sorted_rows, unsorted_rows


class _AllToAll(torch.autograd.Function):
    """Rows to and from every rank of a group; the gradient goes the opposite way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        received = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        returned = gradient.new_empty(sum(ctx.send), *gradient.shape[1:])
        dist.all_to_all_single(returned, gradient.contiguous(), ctx.send, ctx.receive, group=ctx.group)
        return returned, None, None, None


def parallel_experts_forward(
    x_ND: Tensor,
    indices_NK: Tensor,
    gates_NK: Tensor,
    gate_up_eDF2: Tensor,
    down_eFD: Tensor,
    group: dist.ProcessGroup,
    *,
    remakes: bool = False,
) -> Tensor:
    """Like `moe.experts.experts_forward`, [N, D], with this rank's share of the experts. A collective of `group`."""
    ranks_P, local = dist.get_world_size(group), gate_up_eDF2.shape[0]
    order, counts_E = sorted_rows(indices_NK, ranks_P * local)
    counts_Pe = counts_E.view(ranks_P, local)
    arriving_Pe = torch.empty_like(counts_Pe)
    dist.all_to_all_single(arriving_Pe, counts_Pe.contiguous(), group=group)
    send, receive = torch.stack([counts_Pe.sum(1), arriving_Pe.sum(1)]).tolist()

    arrived_RD = _AllToAll.apply(x_ND[order // indices_NK.shape[1]], send, receive, group)
    # What arrives is ordered by sender, then expert; grouped products want it by expert.
    expert_R = torch.arange(local, device=x_ND.device).repeat(ranks_P).repeat_interleave(arriving_Pe.flatten())
    by_expert_R = expert_R.argsort(stable=True)
    # Sorted, what arrived is kept once; there is nothing to gain in making the sorted rows again from the others.
    outputs_RD = grouped_swiglu(arrived_RD[by_expert_R], arriving_Pe.sum(0), gate_up_eDF2, down_eFD, remakes=remakes)
    returned = _AllToAll.apply(unsorted_rows(outputs_RD, by_expert_R), receive, send, group)
    by_token_NKD = unsorted_rows(returned, order).unflatten(0, indices_NK.shape)
    return (by_token_NKD * gates_NK.unsqueeze(-1).to(returned.dtype)).sum(dim=1)
