"""The theory of bias balancing, executable (Han & Zhong 2025, arXiv 2512.03915).

Routing is read as an assignment problem: max sum_ik g_ik x_ik, every token i takes K experts, every expert k takes
L = KT/E tokens. With prices p its Lagrangian is sum_ik (g_ik + p_k) x_ik - L sum_k p_k; a token that maximises its own
part takes the TopK of g + p, and a balancing rule is a step on the prices. Each statement is a function, and a test.

Shape letters: T tokens, E experts, K experts a token takes.
"""

import math
from itertools import pairwise

import networkx
import numpy as np
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


def rebalanced_value(scores_TE: Tensor, prices_E: Tensor, top_k: int) -> float:
    """The same value as `best_balanced_value`, found from the assignment that the prices make; fast where it is near.

    Among all assignments with its own loads, the TopK of g + p is best. Each round hands one choice along the cheapest
    chain of exchanges (a token gives up expert j for expert k at a loss of g_ij - g_ik) from an overloaded expert to an
    underloaded one, which keeps that true of the new loads (successive shortest paths), until all loads are L. Costs
    O(TE) for each choice in excess of L. Raises ValueError unless L is whole.
    """
    g_TE = scores_TE.double().cpu().numpy()
    x_TE = assign(scores_TE.double(), prices_E.double(), top_k).bool().cpu().numpy()
    load = mean_load(scores_TE, top_k)
    if load != int(load):
        raise ValueError(f"K T / E = {load} is not whole: no assignment is perfectly balanced")
    experts = g_TE.shape[1]
    loss_EE, giver_EE = np.empty((experts, experts)), np.empty((experts, experts), dtype=np.int64)
    changed = set(range(experts))
    excess_E = x_TE.sum(axis=0) - int(load)
    while excess_E.any():
        for j in changed:  # the cheapest exchange from j to any other, and from any other to j
            own_t = np.flatnonzero(x_TE[:, j])
            if len(own_t):
                from_j_tE = np.where(x_TE[own_t], np.inf, g_TE[own_t, j : j + 1] - g_TE[own_t])
                giver_EE[j] = own_t[from_j_tE.argmin(axis=0)]
                loss_EE[j] = from_j_tE.min(axis=0)
            else:
                loss_EE[j] = np.inf
            free_t = np.flatnonzero(~x_TE[:, j])
            if len(free_t):
                to_j_tE = np.where(x_TE[free_t], g_TE[free_t] - g_TE[free_t, j : j + 1], np.inf)
                giver_EE[:, j] = free_t[to_j_tE.argmin(axis=0)]
                loss_EE[:, j] = to_j_tE.min(axis=0)
            else:
                loss_EE[:, j] = np.inf
        chain = _cheapest_chain(loss_EE, excess_E > 0, excess_E < 0)
        for j, k in pairwise(chain):
            token = giver_EE[j, k]
            x_TE[token, j], x_TE[token, k] = False, True
        excess_E[chain[0]] -= 1
        excess_E[chain[-1]] += 1
        changed = set(chain)
    return float(g_TE[x_TE].sum())


def _cheapest_chain(loss_EE: np.ndarray, givers_E: np.ndarray, takers_E: np.ndarray) -> list[int]:
    """Experts along the cheapest path from any giver to any taker; losses may be negative, cycles are not (Bellman)."""
    distance_E = np.where(givers_E, 0.0, np.inf)
    previous_E = np.full(len(distance_E), -1)
    while True:
        through_EE = distance_E[:, None] + loss_EE
        best_E = through_EE.min(axis=0)
        better_E = best_E < distance_E - 1e-12
        if not better_E.any():
            break
        previous_E = np.where(better_E, through_EE.argmin(axis=0), previous_E)
        distance_E = np.where(better_E, best_E, distance_E)
    chain = [int(np.where(takers_E, distance_E, np.inf).argmin())]
    while previous_E[chain[0]] >= 0:
        chain.insert(0, int(previous_E[chain[0]]))
    return chain


def gap_per_token(scores_TE: Tensor, prices_E: Tensor, top_k: int) -> float:
    """Duality gap of a sample, d(p) - best balanced value, for each of its tokens.

    Uses the first tokens, as many as make L whole; NaN if there are too few.
    """
    unit = scores_TE.shape[1] // math.gcd(scores_TE.shape[1], top_k)
    kept_TE = scores_TE[: len(scores_TE) // unit * unit].double()
    if not len(kept_TE):
        return math.nan
    gap = float(dual_value(kept_TE, prices_E.double(), top_k)) - rebalanced_value(kept_TE, prices_E, top_k)
    return gap / len(kept_TE)


def duality_gap(scores_TE: Tensor, prices_E: Tensor, top_k: int) -> float:
    """d(p) - best balanced value >= 0: an upper bound on what perfect balance would cost at these prices."""
    return float(dual_value(scores_TE, prices_E, top_k)) - best_balanced_value(scores_TE, top_k)
