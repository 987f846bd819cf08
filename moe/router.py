"""Which experts a token uses, and with what gate.

The bias that balances the experts takes part in the selection and in nothing else: gates come from the unbiased
scores, so the bias has no gradient and leaves the function of the chosen experts alone
(Wang et al. 2024, arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

What a forward learned about loads is returned, never stored: the model adds it up outside recomputed regions.

Shape letters: N tokens, D model width, E experts, K experts a token uses, g groups, Q threshold bins.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.recompute import remade
from trainer.errors import ConfigError

THRESHOLD_BINS = 1000

ScoreFunction = Literal["sigmoid", "softmax", "sqrtsoftplus"]


class RoutingStats(NamedTuple):
    """What one forward did, additive over micro-batches and ranks; int64."""

    counts_E: Tensor
    """Tokens that chose each expert, padding left out."""
    dropped: Tensor
    """Choices beyond an expert's capacity, scalar."""
    thresholds_EQ: Tensor | None
    """Histogram of the bias at which each expert would just have been chosen, if somebody asked for it."""
    by_sample_SE: Tensor | None = None
    """The counts of each sample of this rank in the order of the forwards, int32, if somebody asked for them."""


def count_by_sample(indices_NK: Tensor, samples_N: Tensor, num_samples: int, num_experts: int) -> Tensor:
    """Tokens of each sample that chose each expert, int32 [S, E]; tokens whose sample is -1 are left out."""
    flat_NK = samples_N.unsqueeze(1) * num_experts + indices_NK
    left_out = num_samples * num_experts
    flat_NK = torch.where(samples_N.unsqueeze(1) >= 0, flat_NK, left_out).flatten()
    counts = torch.zeros(left_out + 1, dtype=torch.int32, device=indices_NK.device)
    return counts.scatter_add_(0, flat_NK, torch.ones_like(flat_NK, dtype=torch.int32))[:-1].view(-1, num_experts)


class Routing(NamedTuple):
    """Where the tokens of one forward go."""

    indices_NK: Tensor
    gates_NK: Tensor
    scores_NE: Tensor
    logits_NE: Tensor
    stats: RoutingStats


def router_scores(logits_NE: Tensor, function: ScoreFunction) -> Tensor:
    """Scores in float32, [N, E]."""
    if function == "sigmoid":
        return logits_NE.sigmoid()
    if function == "softmax":
        return logits_NE.softmax(dim=-1)
    return F.softplus(logits_NE).sqrt()


def select_experts(
    scores_NE: Tensor, bias_E: Tensor, *, top_k: int, num_groups: int = 1, top_groups: int = 1
) -> Tensor:
    """Indices of the K experts with the largest biased score, int64 [N, K].

    With groups, only experts of the `top_groups` best groups can be chosen; a group's score is the sum of its two
    largest biased scores (arXiv 2412.19437, section 2.1.2).
    """
    return _top_experts(scores_NE + bias_E, top_k=top_k, num_groups=num_groups, top_groups=top_groups)


def _top_experts(biased_NE: Tensor, *, top_k: int, num_groups: int, top_groups: int) -> Tensor:
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


def uniform_experts(num_tokens: int, top_k: int, num_experts: int, device: torch.device) -> Tensor:
    """Experts dealt in turn, int64 [N, K]: perfectly balanced whatever the scores, for benchmarks."""
    return torch.arange(num_tokens * top_k, device=device).view(num_tokens, top_k) % num_experts


def count_tokens(indices_NK: Tensor, counted_N: Tensor, num_experts: int) -> Tensor:
    """How many counted tokens chose each expert, int64 [E]. `counted_N` is False for padding."""
    chosen = indices_NK.flatten()
    ones = counted_N.to(torch.int64).unsqueeze(1).expand_as(indices_NK).flatten()
    return torch.zeros(num_experts, dtype=torch.int64, device=chosen.device).index_add_(0, chosen, ones)


def within_capacity(
    indices_NK: Tensor,
    gates_NK: Tensor,
    *,
    capacity: int | Tensor,
    num_experts: int,
    by: Literal["score", "position"],
    real_N: Tensor | None = None,
) -> Tensor:
    """Which choices fit when an expert takes at most `capacity` tokens, bool [N, K].

    `position` keeps an expert's first tokens, `score` those with the largest gates (earlier ones on a tie); padding,
    where `real_N` is False, gets what they leave.
    """
    experts = indices_NK.flatten()
    order = torch.arange(experts.numel(), device=experts.device)
    if by == "score":
        order = gates_NK.detach().flatten().argsort(descending=True, stable=True)
    if real_N is not None:
        is_padding = ~real_N.unsqueeze(1).expand_as(indices_NK).flatten()
        order = order[is_padding[order].int().argsort(stable=True)]
    by_expert = order[experts[order].argsort(stable=True)]
    loads_E = count_tokens(indices_NK, torch.ones_like(indices_NK[:, 0]), num_experts)
    first_E = loads_E.cumsum(0) - loads_E
    rank_in_expert = torch.empty_like(experts)
    rank_in_expert[by_expert] = torch.arange(experts.numel(), device=experts.device)
    return (rank_in_expert - first_E[experts] < capacity).view_as(indices_NK)


def threshold_histogram(
    scores_NE: Tensor,
    bias_E: Tensor,
    counted_N: Tensor,
    *,
    top_k: int,
    low: Tensor,
    high: Tensor,
    least_alpha: float = -math.inf,
) -> Tensor:
    """Histogram over tokens of alpha_i - s_ij for each expert, int64 [E, Q] on [low, high].

    alpha_i is the (k+1)-th largest biased score of token i, `least_alpha` at least: expert j would just be chosen with
    bias alpha_i - s_ij.
    """
    alpha_N1 = (scores_NE + bias_E).topk(top_k + 1, dim=-1).values[:, -1:].clamp(min=least_alpha)
    position_NE = (alpha_N1 - scores_NE - low) / (high - low) * THRESHOLD_BINS
    bin_NE = position_NE.long().clamp(0, THRESHOLD_BINS - 1)
    num_experts = scores_NE.shape[1]
    flat_NE = bin_NE + THRESHOLD_BINS * torch.arange(num_experts, device=scores_NE.device)
    ones_NE = counted_N.to(torch.int64).unsqueeze(1).expand_as(flat_NE)
    histogram = torch.zeros(num_experts * THRESHOLD_BINS, dtype=torch.int64, device=scores_NE.device)
    return histogram.index_add_(0, flat_NE.flatten(), ones_NE.flatten()).view(num_experts, THRESHOLD_BINS)


class Router(nn.Module):
    """Scores, bias and selection of one layer. The bias is a float32 buffer whatever type the model is cast to."""

    expert_bias_E: Tensor
    remakes = False
    """Whether the backward makes the float32 copy of the input again (moe/recompute.py)."""
    multiplies = False
    """Whether the bias multiplies the scores instead of being added."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_experts, self.top_k = config.num_experts, config.top_k
        self._config = config
        self.collects_thresholds, self._least_alpha = False, -math.inf
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("expert_bias_E", torch.zeros(config.num_experts, dtype=torch.float32))

    def prepare_balancing(
        self, *, multiplicative: bool, collect_thresholds: bool, least_alpha: float = -math.inf
    ) -> None:
        """Set the router up for a rule: how the bias enters the selection, and what has to be observed.

        A multiplicative bias starts at 1; an additive one where it is: at 0, or what initial weights brought. If the
        router multiplies already, its biases stay as they are.

        Raises ConfigError if the rule cannot work with this router.
        """
        config = self._config
        if collect_thresholds and (config.router_score == "sqrtsoftplus" or config.num_groups > 1):
            raise ConfigError("expert bias: quantile and bip need bounded scores and no groups; choose another rule")
        if collect_thresholds and config.top_k == config.num_experts:
            raise ConfigError("expert bias: quantile and bip have nothing to solve where every expert is always chosen")
        starts_multiplying = multiplicative and not self.multiplies
        self.multiplies, self.collects_thresholds = multiplicative, collect_thresholds
        self._least_alpha = least_alpha
        if starts_multiplying:
            if self.expert_bias_E.unique().numel() > 1:
                raise ConfigError(
                    "expert bias: rule multiplicative cannot start from the biases of init_from; they add"
                )
            self.expert_bias_E.fill_(1.0)

    @property
    def selects_by_price(self) -> bool:
        """Whether a token takes the TopK of score + bias, so that the biases are prices in the sense of moe/theory.py.

        Not with groups or uniform routing. A multiplicative bias sets prices on the logarithm of the scores: its gap
        would be in other units than everybody's.
        """
        config = self._config
        return not (self.multiplies or config.num_groups > 1 or config.uniform_routing)

    def threshold_range(self) -> tuple[Tensor, Tensor]:
        """Edges of the threshold histogram under the present bias: scores lie in [0, 1]."""
        return self.expert_bias_E.min() - 1, self.expert_bias_E.max() + 1

    def forward(self, x_ND: Tensor, counted_N: Tensor, real_N: Tensor | None = None) -> Routing:
        """Route every token; gates are float32 [N, K]. What has no target (`counted_N` False) is not counted.

        `real_N` is False for padding, which takes no capacity from tokens; with None all are tokens.
        """
        config = self._config
        # Routing is a comparison of close numbers: products, scores and selection all stay in float32.
        if config.router_jitter and self.training:
            # Drawn from torch's generator, whose state checkpoints keep and recomputation and two passes replay.
            noise_ND = torch.empty_like(x_ND, dtype=torch.float32)
            x_ND = x_ND.float() * noise_ND.uniform_(1 - config.router_jitter, 1 + config.router_jitter)
        logits_NE = remade(self.remakes, self._logits, x_ND)
        scores_NE = router_scores(logits_NE, config.router_score)
        with torch.no_grad():
            indices_NK = self._select(scores_NE)
        gates_NK = gates_of(scores_NE, indices_NK, normalize=config.normalize_gates, scale=config.routed_scale)
        dropped = torch.zeros((), dtype=torch.int64, device=x_ND.device)
        if config.capacity_factor:
            # A tensor, not a number: the host need not know how much of a micro-batch is padding.
            num_real = torch.full_like(dropped, len(x_ND)) if real_N is None else real_N.sum()
            capacity = (config.capacity_factor * num_real.double() * self.top_k / self.num_experts).ceil()
            kept_NK = within_capacity(
                indices_NK,
                gates_NK,
                capacity=capacity,
                num_experts=self.num_experts,
                by=config.drop_by,
                real_N=real_N,
            )
            gates_NK = gates_NK * kept_NK
            dropped = (~kept_NK & counted_N.unsqueeze(1)).sum()
        stats = RoutingStats(
            count_tokens(indices_NK, counted_N, self.num_experts), dropped, self._thresholds(scores_NE, counted_N)
        )
        return Routing(indices_NK, gates_NK, scores_NE, logits_NE, stats)

    def _logits(self, x_ND: Tensor) -> Tensor:
        return x_ND.float() @ self.weight.float().T

    def _select(self, scores_NE: Tensor) -> Tensor:
        config = self._config
        if config.uniform_routing:
            return uniform_experts(scores_NE.shape[0], self.top_k, self.num_experts, scores_NE.device)
        biased_NE = scores_NE * self.expert_bias_E if self.multiplies else scores_NE + self.expert_bias_E
        return _top_experts(biased_NE, top_k=self.top_k, num_groups=config.num_groups, top_groups=config.top_groups)

    @torch.no_grad()
    def _thresholds(self, scores_NE: Tensor, counted_N: Tensor) -> Tensor | None:
        if not (self.collects_thresholds and self.training):
            return None
        low, high = self.threshold_range()
        return threshold_histogram(
            scores_NE,
            self.expert_bias_E,
            counted_N,
            top_k=self.top_k,
            low=low,
            high=high,
            least_alpha=self._least_alpha,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        # model.bfloat16() casts floating buffers too; a bias that moves by 1e-3 a step would not survive it.
        # Devices are followed, the type is not.
        exact_E = self.expert_bias_E
        super()._apply(fn, recurse)
        if self.expert_bias_E.dtype != torch.float32:
            self.expert_bias_E = exact_E.to(device=self.expert_bias_E.device)
        return self
