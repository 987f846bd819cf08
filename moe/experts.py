"""The routed experts: many small feed-forwards as a few grouped products.

Tokens are sorted by expert, so that each expert's rows lie together, and `grouped_mm` runs all experts in one call
with offsets that never leave the device. The same code runs on CPU and CUDA.

Shape letters: N tokens, D model width, F expert width, E experts, K experts a token uses.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import ModelConfig


def experts_forward(
    x_ND: Tensor, indices_NK: Tensor, gates_NK: Tensor, gate_up_EDF2: Tensor, down_EFD: Tensor
) -> Tensor:
    """Sum over each token's K experts of gate * SwiGLU(x), [N, D]. Experts without tokens are allowed, as is N = 0."""
    num_tokens, top_k = indices_NK.shape
    if num_tokens == 0:
        # Still a function of every parameter: a rank without tokens must take part in the gradient reduction.
        return x_ND + 0.0 * (gate_up_EDF2.sum() + down_EFD.sum() + gates_NK.sum()).to(x_ND.dtype)
    order = indices_NK.flatten().argsort(stable=True)
    token_of_row = order // top_k
    rows_per_expert_E = torch.bincount(indices_NK.flatten(), minlength=gate_up_EDF2.shape[0])
    offsets_E = rows_per_expert_E.cumsum(0).to(torch.int32)

    rows = x_ND[token_of_row]
    gate, up = _grouped_product(rows, gate_up_EDF2, offsets_E).chunk(2, dim=-1)
    outputs = _grouped_product(F.silu(gate) * up, down_EFD, offsets_E)
    # Back to token order by a permutation rather than an atomic add: the sum over K has a fixed order.
    by_token_NKD = torch.empty_like(outputs).index_copy(0, order, outputs).view(num_tokens, top_k, -1)
    return (by_token_NKD * gates_NK.unsqueeze(-1).to(outputs.dtype)).sum(dim=1)


def _grouped_product(rows: Tensor, weights: Tensor, offsets_E: Tensor) -> Tensor:
    if rows.is_cuda and rows.dtype == torch.float32:
        # CUDA's grouped product knows bf16 only. fp32 on a GPU is for checking, so a loop (and its sync) will do.
        parts = rows.tensor_split(offsets_E[:-1].long().cpu())
        return torch.cat([part @ weight for part, weight in zip(parts, weights, strict=True)])
    return F.grouped_mm(rows, weights, offs=offsets_E)


class Experts(nn.Module):
    """The weights of one layer's routed experts, stacked over experts in the layout of the grouped product."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, width, intermediate = config.num_experts, config.hidden_size, config.expert_intermediate_size
        self.gate_up = nn.Parameter(torch.empty(experts, width, 2 * intermediate))
        self.down = nn.Parameter(torch.empty(experts, intermediate, width))

    def forward(self, x_ND: Tensor, indices_NK: Tensor, gates_NK: Tensor) -> Tensor:
        return experts_forward(x_ND, indices_NK, gates_NK, self.gate_up, self.down)
