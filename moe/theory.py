"""The theory of bias balancing, executable (Han & Zhong 2025, arXiv 2512.03915).

Routing is read as an assignment problem: max sum_ik g_ik x_ik, every token i takes K experts, every expert k takes
L = KT/E tokens. With prices p its Lagrangian is sum_ik (g_ik + p_k) x_ik - L sum_k p_k; a token that maximises its own
part takes the TopK of g + p, and a balancing rule is a step on the prices. Each statement is a function, and a test.

Shape letters: T tokens, E experts, K experts a token takes.
"""

import networkx
import torch
from torch import Tensor


def assign(scores_TE: Tensor, prices_E: Tensor, top_k: int) -> Tensor:
    """x_TE: 1.0 where an expert is among the TopK of g + p."""
    chosen = (scores_TE + prices_E).topk(top_k, dim=1).indices
    return torch.zeros_like(scores_TE).scatter_(1, chosen, 1.0)


def mean_load(scores_TE: Tensor, top_k: int) -> float:
    """L = KT / E."""
    return top_k * scores_TE.shape[0] / scores_TE.shape[1]


def lagrangian(scores_TE: Tensor, x_TE: Tensor, prices_E: Tensor, top_k: int) -> Tensor:
    """Lag(x, p) = sum_ik (g_ik + p_k) x_ik - L sum_k p_k. Scalar."""
    return ((scores_TE + prices_E) * x_TE).sum() - mean_load(scores_TE, top_k) * prices_E.sum()


def dual_value(scores_TE: Tensor, prices_E: Tensor, top_k: int) -> Tensor:
    """d(p) = sum_i topKsum(g_i + p) - L sum p = max_x Lag(x, p): convex in p, with subgradient A - L. Scalar."""
    best = (scores_TE + prices_E).topk(top_k, dim=1).values.sum()
    return best - mean_load(scores_TE, top_k) * prices_E.sum()


def switching_benefit(scores_TE: Tensor, old_x_TE: Tensor, new_x_TE: Tensor, new_prices_E: Tensor) -> Tensor:
    """b'(i) = sum_k (g_ik + p'_k)(x'_ik - x_ik) >= 0: what token i gains by choosing anew at the new prices, [T]."""
    return ((scores_TE + new_prices_E) * (new_x_TE - old_x_TE)).sum(dim=1)


def price_term(old_x_TE: Tensor, old_prices_E: Tensor, new_prices_E: Tensor, load: float) -> Tensor:
    """sum_k (p'_k - p_k)(L - A_k); it is sum_k eps_k (A_k - L)^2 for the step p' = p + eps (L - A). Scalar."""
    return ((new_prices_E - old_prices_E) * (load - old_x_TE.sum(dim=0))).sum()


def lagrangian_change(
    scores_TE: Tensor, old_x_TE: Tensor, new_x_TE: Tensor, old_prices_E: Tensor, new_prices_E: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    """Both terms of Lag(x', p') - Lag(x, p) = sum_i b'(i) - sum_k eps_k (A_k - L)^2, which always holds.

    The Lagrangian falls in a step exactly when the first is not larger than the second.
    """
    benefit = switching_benefit(scores_TE, old_x_TE, new_x_TE, new_prices_E).sum()
    return benefit, price_term(old_x_TE, old_prices_E, new_prices_E, mean_load(scores_TE, top_k))


def prefers_cheaper(old_x_TE: Tensor, new_x_TE: Tensor, price_change_E: Tensor) -> Tensor:
    """Whether every token that swapped left experts whose prices rose no more than those of what it took, bool [T].

    With sums over swapped sets: sum of dp over what was taken >= sum of dp over what was left.
    """
    moved_TE = new_x_TE - old_x_TE
    return (moved_TE * price_change_E).sum(dim=1) >= -1e-12


def margins(scores_TE: Tensor, prices_E: Tensor, top_k: int) -> Tensor:
    """Distance between the K-th and the (K+1)-th largest g + p of each token, [T]."""
    top = (scores_TE + prices_E).topk(top_k + 1, dim=1).values
    return top[:, top_k - 1] - top[:, top_k]


def movable_share(scores_TE: Tensor, prices_E: Tensor, top_k: int, rate: float) -> Tensor:
    """Certificate: share of tokens with a margin below 2u. No other token can change in the next sign step. Scalar."""
    return (margins(scores_TE, prices_E, top_k) < 2 * rate).double().mean()


def regret(scores: list[Tensor], prices: list[Tensor], top_k: int, fixed_prices_E: Tensor) -> Tensor:
    """sum_n d_n(p_n) - sum_n d_n(p): what a sequence of prices lost against one that stays fixed. Scalar."""
    lost = [dual_value(s, p, top_k) - dual_value(s, fixed_prices_E, top_k) for s, p in zip(scores, prices, strict=True)]
    return torch.stack(lost).sum()


def best_balanced_value(scores_TE: Tensor, top_k: int) -> float:
    """Value of the best assignment in which every expert takes exactly L tokens, by min-cost flow; for small cases.

    Scores are rounded to 1e-6. Raises ValueError unless L is whole.
    """
    tokens, experts = scores_TE.shape
    load = mean_load(scores_TE, top_k)
    if load != int(load):
        raise ValueError(f"K T / E = {load} is not whole: no assignment is perfectly balanced")
    graph = networkx.DiGraph()
    for i in range(tokens):
        graph.add_node(("token", i), demand=-top_k)
        for k in range(experts):
            graph.add_edge(("token", i), ("expert", k), capacity=1, weight=-round(float(scores_TE[i, k]) * 1e6))
    for k in range(experts):
        graph.add_node(("expert", k), demand=int(load))
    cost, _ = networkx.network_simplex(graph)
    return -cost / 1e6


def duality_gap(scores_TE: Tensor, prices_E: Tensor, top_k: int) -> float:
    """d(p) - best balanced value >= 0: an upper bound on what perfect balance would cost at these prices."""
    return float(dual_value(scores_TE, prices_E, top_k)) - best_balanced_value(scores_TE, top_k)
