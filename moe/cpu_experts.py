"""The routed experts on a CPU, without ever holding a copy of every token for every expert.

Grouped products want all N*K rows gathered; on a CPU moving those rows costs more than what sorting saves. Here each
expert in turn gathers its rows into a buffer that all experts share, runs its two products, and adds the weighted
result to its tokens. Only the input of the activation is kept for the backward; everything else is gathered or computed
again. Six matrix products an expert, forward and backward, all of them plain.

The gradient of a gate is <d(gate * a), a> with a the activation: it needs no product of its own, and no expert output.

`cpu_experts.cpp` is the same loop with what lies between the products fused; it is used where it has been built
(moe/native.py). The one here is what it must agree with, and runs anywhere.

Shape letters: N tokens, R rows (a token's copies for its experts), r rows of one expert, D model width, F expert width,
E experts, K experts a token uses.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe import native


class CpuExperts(torch.autograd.Function):
    """(x_ND, gates_R, gate_up_ED2F, down_EFD, token_of_row_R, counts, needs_backward) -> y_ND; rows sorted by expert.

    `needs_backward`: keep what the backward needs. A function cannot ask: inside it gradients are always off.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        gates_R: Tensor,
        gate_up: Tensor,
        down: Tensor,
        token_of_row_R: Tensor,
        counts: list[int],
        needs_backward: bool,
    ) -> Tensor:
        x_ND = x_ND.contiguous()
        forward = torch.ops.evenkeel.experts_forward if native.available() else _forward
        y_ND, kept = forward(x_ND, gates_R, gate_up, down, token_of_row_R, counts, needs_backward)
        if needs_backward:
            ctx.save_for_backward(x_ND, gates_R, gate_up, down, token_of_row_R, kept)
            ctx.counts = counts
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None, None]:
        x_ND, gates_R, gate_up, down, token_of_row_R, kept = ctx.saved_tensors
        backward = torch.ops.evenkeel.experts_backward if native.available() else _backward
        gradients = backward(dy_ND.contiguous(), x_ND, gates_R, gate_up, down, token_of_row_R, ctx.counts, kept)
        return (*gradients, None, None, None)


def _forward(
    x_ND: Tensor, gates_R: Tensor, gate_up: Tensor, down: Tensor, token_of_row_R: Tensor, counts: list[int], keep: bool
) -> tuple[Tensor, Tensor]:
    """y [N, D], and the input of the activation [R, 2F] if `keep`."""
    width, intermediate, largest = x_ND.shape[1], down.shape[1], max(counts, default=0)
    gathered, outputs = x_ND.new_empty(largest, width), x_ND.new_empty(largest, width)
    active = x_ND.new_empty(largest, intermediate)
    kept = x_ND.new_empty(len(token_of_row_R) if keep else largest, 2 * intermediate)
    y_ND = torch.zeros_like(x_ND)
    for expert, rows in _spans(counts):
        tokens_r, n = token_of_row_R[rows], rows.stop - rows.start
        x_r = torch.index_select(x_ND, 0, tokens_r, out=gathered[:n])
        gate_up_r = torch.mm(x_r, gate_up[expert], out=kept[rows] if keep else kept[:n])
        a_r = _activate(gate_up_r, active[:n]).mul_(gates_R[rows].unsqueeze(1))
        y_ND.index_add_(0, tokens_r, torch.mm(a_r, down[expert], out=outputs[:n]))
    return y_ND, kept


def _backward(
    dy_ND: Tensor,
    x_ND: Tensor,
    gates_R: Tensor,
    gate_up: Tensor,
    down: Tensor,
    token_of_row_R: Tensor,
    counts: list[int],
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x [N, D], gates [R], gate_up and down."""
    width, intermediate, largest = x_ND.shape[1], down.shape[1], max(counts, default=0)
    gathered, moved = x_ND.new_empty(largest, width), x_ND.new_empty(largest, width)
    silu, active, d_active = (x_ND.new_empty(largest, intermediate) for _ in range(3))
    d_inner = x_ND.new_empty(largest, 2 * intermediate)
    dx_ND, dgates_R = torch.zeros_like(x_ND), torch.empty_like(gates_R)
    d_gate_up, d_down = torch.empty_like(gate_up), torch.empty_like(down)
    for expert, rows in _spans(counts, d_gate_up, d_down):
        tokens_r, n = token_of_row_R[rows], rows.stop - rows.start
        gates_r1 = gates_R[rows].unsqueeze(1)
        gate_r, up_r = kept[rows].chunk(2, dim=1)
        dy_r = torch.index_select(dy_ND, 0, tokens_r, out=gathered[:n])
        silu_r = torch.ops.aten.silu.out(gate_r, out=silu[:n])
        a_r = torch.mul(silu_r, up_r, out=active[:n])
        da_r = torch.mm(dy_r, down[expert].T, out=d_active[:n])
        torch.linalg.vecdot(da_r, a_r, out=dgates_R[rows])
        torch.mm(a_r.mul_(gates_r1).T, dy_r, out=d_down[expert])

        da_r.mul_(gates_r1)
        d_gate_r, d_up_r = d_inner[:n].chunk(2, dim=1)
        torch.mul(da_r, silu_r, out=d_up_r)
        torch.ops.aten.silu_backward.grad_input(da_r.mul_(up_r), gate_r, grad_input=d_gate_r)
        x_r = torch.index_select(x_ND, 0, tokens_r, out=gathered[:n])
        torch.mm(x_r.T, d_inner[:n], out=d_gate_up[expert])
        dx_ND.index_add_(0, tokens_r, torch.mm(d_inner[:n], gate_up[expert].T, out=moved[:n]))
    return dx_ND, dgates_R, d_gate_up, d_down


def _activate(gate_up_r: Tensor, out_r: Tensor) -> Tensor:
    """silu(gate) * up into `out_r`, [r, F]."""
    gate_r, up_r = gate_up_r.chunk(2, dim=1)
    return torch.ops.aten.silu.out(gate_r, out=out_r).mul_(up_r)


def _spans(counts: list[int], *gradients: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and where they lie; gradients of the others are set to zero."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        else:
            for gradient in gradients:
                gradient[expert].zero_()
        start += count


def cpu_experts_forward(
    x_ND: Tensor, order_R: Tensor, counts_E: Tensor, gates_NK: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Sum over each token's experts of gate * SwiGLU(x), [N, D], for choices sorted by expert by `order_R`."""
    token_of_row_R = order_R // gates_NK.shape[1]
    gates_R = gates_NK.flatten()[order_R].to(x_ND.dtype)
    needs_backward = torch.is_grad_enabled() and any(t.requires_grad for t in (x_ND, gates_R, gate_up, down))
    y_ND: Tensor = CpuExperts.apply(x_ND, gates_R, gate_up, down, token_of_row_R, counts_E.tolist(), needs_backward)
    return y_ND
