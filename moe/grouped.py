"""The arithmetic of the routed experts: many small feed-forwards as a few grouped products.

Tokens are sorted by expert, so that each expert's rows lie together, and `grouped_mm` runs all experts in one call
with offsets that never leave the device. The same code runs on CPU and CUDA.

Shape letters: N tokens, R rows (a token's copies for its experts), D model width, F expert width, E experts, K experts
a token uses.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.cpu_experts import cpu_experts_forward
from moe.recompute import remade
from trainer.phases import cut


def experts_forward(
    x_ND: Tensor,
    indices_NK: Tensor,
    gates_NK: Tensor,
    gate_up_EDF2: Tensor,
    down_EFD: Tensor,
    *,
    remakes: bool = False,
) -> Tensor:
    """Sum over each token's K experts of gate * SwiGLU(x), [N, D]. Experts without tokens are allowed, as is N = 0.

    `remakes`: the backward gathers rows and computes activations again; the loop on a CPU does so in any case.
    """
    order, counts_E = sorted_rows(indices_NK, gate_up_EDF2.shape[0])
    if x_ND.device.type == "cpu" and x_ND.dtype in (torch.float32, torch.float64):
        # One loop gathers, multiplies and adds: none of it can be told apart.
        return cpu_experts_forward(cut("experts", x_ND), order, counts_E, gates_NK, gate_up_EDF2, down_EFD)
    token_of_row_R = order // indices_NK.shape[1]
    outputs = grouped_swiglu(x_ND, counts_E, gate_up_EDF2, down_EFD, token_of_row_R=token_of_row_R, remakes=remakes)
    # Back to token order by a permutation rather than an atomic add: the sum over K has a fixed order.
    by_token_NKD = unsorted_rows(outputs, order).unflatten(0, indices_NK.shape)
    return (by_token_NKD * gates_NK.unsqueeze(-1).to(outputs.dtype)).sum(dim=1)


def sorted_rows(indices_NK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Order that sorts all choices by expert, int64 [N*K], and how many each expert has, int64 [E]."""
    chosen = indices_NK.flatten()
    # Not bincount, which waits for the device to learn its length.
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=chosen.device)
    return chosen.argsort(stable=True), counts_E.index_add_(0, chosen, torch.ones_like(chosen))


def unsorted_rows(rows_R: Tensor, order_R: Tensor) -> Tensor:
    """The rows that `rows[order]` took, back where they were."""
    unsorted: Tensor = _UnsortedRows.apply(rows_R, order_R)
    return unsorted


class _UnsortedRows(torch.autograd.Function):
    """torch's own index_copy keeps all the rows for its backward, which needs no more than their order."""

    @staticmethod
    def forward(ctx: Any, rows_R: Tensor, order_R: Tensor) -> Tensor:
        ctx.save_for_backward(order_R)
        return torch.empty_like(rows_R).index_copy_(0, order_R, rows_R)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (order_R,) = ctx.saved_tensors
        return gradients[0][order_R], None


def grouped_swiglu(
    x: Tensor,
    counts_E: Tensor,
    gate_up_EDF2: Tensor,
    down_EFD: Tensor,
    *,
    token_of_row_R: Tensor | None = None,
    remakes: bool = False,
) -> Tensor:
    """SwiGLU of rows that lie together by expert, `counts_E` of them for each, [R, D].

    The rows are `x` itself, or copies of its tokens. `remakes`: the backward makes copies and activations again.
    """
    if (x if token_of_row_R is None else token_of_row_R).shape[0] == 0:
        # Still a function of every parameter: a rank without tokens must take part in the gradient reduction.
        return x[:0] + 0.0 * (gate_up_EDF2.sum() + down_EFD.sum())
    offsets_E = counts_E.cumsum(0).to(torch.int32)

    def expand(x: Tensor) -> Tensor:
        rows_RD = x if token_of_row_R is None else x[token_of_row_R]
        return _grouped_product(cut("experts", rows_RD), gate_up_EDF2, offsets_E)

    def contract(gate_up_RF2: Tensor) -> Tensor:
        gate_RF, up_RF = gate_up_RF2.chunk(2, dim=-1)
        return _grouped_product(F.silu(gate_RF) * up_RF, down_EFD, offsets_E)

    gate_up_RF2 = remade(remakes and token_of_row_R is not None, expand, x)
    return cut("combine", remade(remakes, contract, gate_up_RF2))


def _grouped_product(rows: Tensor, weights: Tensor, offsets_E: Tensor) -> Tensor:
    if rows.is_cuda and rows.dtype == torch.float32:
        # CUDA's grouped product knows bf16 only. fp32 on a GPU is for checking, so a loop (and its sync) will do.
        parts = rows.tensor_split(offsets_E[:-1].long().cpu())
        return torch.cat([part @ weight for part, weight in zip(parts, weights, strict=True)])
    return F.grouped_mm(rows, weights, offs=offsets_E)
