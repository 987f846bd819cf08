"""The weights of the routed experts, all on one rank or spread over an expert group."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.expert_parallel import parallel_experts_forward
from moe.grouped import experts_forward


class Experts(nn.Module):
    """The weights of one layer's routed experts, stacked over experts in the layout of the grouped product.

    With expert parallelism a rank holds its share of the stack. Its parameters then carry the marks by which DeepSpeed
    knows them: `allreduce = False` and the name of their group.
    """

    remakes = False
    """Whether the backward makes again what lies between products (moe/recompute.py)."""

    def __init__(self, config: ModelConfig, *, parallel_size: int = 1) -> None:
        super().__init__()
        assert config.num_experts % parallel_size == 0
        local, width, intermediate = (
            config.num_experts // parallel_size,
            config.hidden_size,
            config.expert_intermediate_size,
        )
        self.gate_up = nn.Parameter(torch.empty(local, width, 2 * intermediate))
        self.down = nn.Parameter(torch.empty(local, intermediate, width))
        self.group: dist.ProcessGroup | None = None
        if parallel_size > 1:
            for parameter in self.parameters():
                parameter.allreduce = False  # type: ignore[attr-defined]
                parameter.group_name = f"ep_size_{parallel_size}"  # type: ignore[attr-defined]

    def forward(self, x_ND: Tensor, indices_NK: Tensor, gates_NK: Tensor) -> Tensor:
        if self.group is None:
            return experts_forward(x_ND, indices_NK, gates_NK, self.gate_up, self.down, remakes=self.remakes)
        return parallel_experts_forward(
            x_ND, indices_NK, gates_NK, self.gate_up, self.down, self.group, remakes=self.remakes
        )
