"""Which experts a token uses, and with what gate.

The bias that balances the experts takes part in the selection and in nothing else: gates come from the unbiased
scores, so the bias has no gradient and leaves the function of the chosen experts alone
(Wang et al. 2024, arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

Shape letters: N tokens, D model width, E experts, K experts a token uses, g groups.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe.config import ModelConfig


def select_experts(
    scores_NE: Tensor, bias_E: Tensor, *, top_k: int, num_groups: int = 1, top_groups: int = 1
) -> Tensor:
    """Indices of the K experts with the largest biased score, int64 [N, K].

    With groups, only experts of the `top_groups` best groups can be chosen; a group's score is the sum of its two
    largest biased scores (arXiv 2412.19437, section 2.1.2).
    """
    biased_NE = scores_NE + bias_E
    if num_groups > 1:
        grouped_Nge = biased_NE.unflatten(1, (num_groups, -1))
        best_Ng = grouped_Nge.topk(2, dim=-1).values.sum(dim=-1).topk(top_groups, dim=-1, sorted=False).indices
        allowed_Ng = torch.zeros_like(grouped_Nge[..., 0], dtype=torch.bool).scatter_(1, best_Ng, True)
        biased_NE = grouped_Nge.masked_fill(~allowed_Ng.unsqueeze(-1), -torch.inf).flatten(1)
    return biased_NE.topk(top_k, dim=-1).indices


def gates_of(scores_NE: Tensor, indices_NK: Tensor, *, normalize: bool, scale: float) -> Tensor:
    """Gate of each chosen expert from the UNBIASED scores, [N, K]; divided by their sum if `normalize`."""
    gates_NK = scores_NE.gather(1, indices_NK)
    if normalize:
        gates_NK = gates_NK / (gates_NK.sum(dim=-1, keepdim=True) + 1e-20)
    return gates_NK * scale


def count_tokens(indices_NK: Tensor, counted_N: Tensor, num_experts: int) -> Tensor:
    """How many counted tokens chose each expert, int64 [E]. `counted_N` is False for padding."""
    chosen = indices_NK.flatten()
    ones = counted_N.to(torch.int64).unsqueeze(1).expand_as(indices_NK).flatten()
    return torch.zeros(num_experts, dtype=torch.int64, device=chosen.device).index_add_(0, chosen, ones)


class Router(nn.Module):
    """Scores, bias and selection of one layer. The bias is a float32 buffer whatever type the model is cast to."""

    expert_bias_E: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_experts, self.top_k = config.num_experts, config.top_k
        self._config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("expert_bias_E", torch.zeros(config.num_experts, dtype=torch.float32))

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen experts int64 [N, K] and their gates float32 [N, K]."""
        config = self._config
        # Routing is a comparison of close numbers: products, scores and selection all stay in float32.
        logits_NE = x_ND.float() @ self.weight.float().T
        scores_NE = logits_NE.sigmoid() if config.router_score == "sigmoid" else logits_NE.softmax(dim=-1)
        indices_NK = select_experts(
            scores_NE.detach(),
            self.expert_bias_E,
            top_k=config.top_k,
            num_groups=config.num_groups,
            top_groups=config.top_groups,
        )
        gates_NK = gates_of(scores_NE, indices_NK, normalize=config.normalize_gates, scale=config.routed_scale)
        return indices_NK, gates_NK

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        # model.bfloat16() casts floating buffers too; a bias that moves by 1e-3 a step would not survive it.
        # Devices are followed, the type is not.
        exact_E = self.expert_bias_E
        super()._apply(fn, recurse)
        if self.expert_bias_E.dtype != torch.float32:
            self.expert_bias_E = exact_E.to(device=self.expert_bias_E.device)
        return self
