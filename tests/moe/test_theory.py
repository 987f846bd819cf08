"""Every statement of the primal-dual reading of bias balancing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe import theory
from moe.rules import RULES, Loads, RuleOptions, apply_rule

seeds = st.integers(0, 2**31)


def random_scores(seed: int, tokens: int = 64, experts: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    skew = torch.linspace(-1, 1, experts, dtype=torch.float64)
    return (torch.randn(tokens, experts, generator=generator, dtype=torch.float64) + skew).sigmoid()


def sign_step(x_TE: torch.Tensor, prices_E: torch.Tensor, rate: float) -> torch.Tensor:
    loads_E = x_TE.sum(0)
    return prices_E + rate * (loads_E.mean() - loads_E).sign()


def test_identity_holds_in_every_step_and_the_lagrangian_falls_exactly_when_it_says() -> None:
    """512 tokens, 16 experts, K 4, u 0.01, 300 steps: the identity always, a fall in some steps only."""
    scores_TE, prices_E = random_scores(0, 512, 16), torch.zeros(16, dtype=torch.float64)
    x_TE = theory.assign(scores_TE, prices_E, 4)
    falls = 0
    for _ in range(300):
        new_prices_E = sign_step(x_TE, prices_E, 0.01)
        new_x_TE = theory.assign(scores_TE, new_prices_E, 4)
        benefit, price = theory.lagrangian_change(scores_TE, x_TE, new_x_TE, prices_E, new_prices_E, 4)
        change = theory.lagrangian(scores_TE, new_x_TE, new_prices_E, 4) - theory.lagrangian(
            scores_TE, x_TE, prices_E, 4
        )
        assert change.item() == pytest.approx((benefit - price).item(), abs=1e-6)
        assert price.item() == pytest.approx(0.01 * (x_TE.sum(0) - 128).abs().sum().item())
        assert (change <= 1e-9) == (benefit <= price + 1e-9)
        falls += int(change <= 0)
        x_TE, prices_E = new_x_TE, new_prices_E
    assert 0 < falls < 300, "monotone decrease is not unconditional"


@given(seed=seeds, rate=st.floats(1e-4, 0.5))
def test_switching_never_hurts_and_prefers_the_cheaper(seed: int, rate: float) -> None:
    scores_TE = random_scores(seed)
    prices_E = torch.randn(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.1
    x_TE = theory.assign(scores_TE, prices_E, 3)
    new_prices_E = sign_step(x_TE, prices_E, rate)
    new_x_TE = theory.assign(scores_TE, new_prices_E, 3)
    benefit_T = theory.switching_benefit(scores_TE, x_TE, new_x_TE, new_prices_E)
    assert (benefit_T >= -1e-12).all()
    assert theory.prefers_cheaper(x_TE, new_x_TE, new_prices_E - prices_E).all()
    swaps_T = (new_x_TE - x_TE).clamp(min=0).sum(1)
    assert (benefit_T <= 2 * rate * swaps_T + 1e-12).all(), "each swap is worth at most 2u"


@given(seed=seeds, rate=st.floats(1e-4, 0.1))
def test_margin_certificate_bounds_what_moves(seed: int, rate: float) -> None:
    scores_TE, prices_E = random_scores(seed), torch.zeros(8, dtype=torch.float64)
    x_TE = theory.assign(scores_TE, prices_E, 2)
    new_x_TE = theory.assign(scores_TE, sign_step(x_TE, prices_E, rate), 2)
    moved = (x_TE != new_x_TE).any(1).double().mean()
    assert moved <= theory.movable_share(scores_TE, prices_E, 2, rate) + 1e-12


@given(seed=seeds)
def test_dual_is_convex_with_subgradient_load_minus_mean(seed: int) -> None:
    scores_TE = random_scores(seed)
    generator = torch.Generator().manual_seed(seed)
    p_E, q_E = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    d_p, d_q = (theory.dual_value(scores_TE, prices, 2) for prices in (p_E, q_E))
    assert theory.dual_value(scores_TE, (p_E + q_E) / 2, 2) <= (d_p + d_q) / 2 + 1e-9
    subgradient_E = theory.assign(scores_TE, p_E, 2).sum(0) - theory.mean_load(scores_TE, 2)
    assert d_q >= d_p + (subgradient_E * (q_E - p_E)).sum() - 1e-9
    assert theory.dual_value(scores_TE, p_E + 3.7, 2).item() == pytest.approx(d_p.item())


@given(seed=seeds)
@settings(max_examples=10)
def test_gap_is_never_negative_and_closes_under_balancing(seed: int) -> None:
    scores_TE, prices_E = random_scores(seed, 24, 6), torch.zeros(6, dtype=torch.float64)
    start = theory.duality_gap(scores_TE, prices_E, 2)
    best = start
    for n in range(1, 600):
        x_TE = theory.assign(scores_TE, prices_E, 2)
        prices_E = prices_E + 0.05 / n**0.5 * (8 - x_TE.sum(0)) / 8
        if n % 150 == 0:
            best = min(best, theory.duality_gap(scores_TE, prices_E, 2))
    assert start >= -1e-4
    assert -1e-4 <= best <= 0.1 * start + 0.02


def test_gap_is_zero_at_a_balanced_optimum() -> None:
    scores_TE = torch.eye(4, dtype=torch.float64).repeat(3, 1)
    assert theory.duality_gap(scores_TE, torch.zeros(4, dtype=torch.float64), 1) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="not whole"):
        theory.best_balanced_value(scores_TE[:3], 1)


@given(
    seed=seeds, tokens=st.sampled_from([8, 24, 40]), top_k=st.integers(1, 7), scale=st.sampled_from([0.0, 0.1, 3.0]),
    grid=st.booleans(),
)  # fmt: skip
@settings(max_examples=30)
def test_rebalancing_finds_the_best_balanced_assignment_from_any_prices(
    seed: int, tokens: int, top_k: int, scale: float, grid: bool
) -> None:
    scores_TE = random_scores(seed, tokens, 8)
    if grid:
        scores_TE = (scores_TE * 4).round() / 4  # ties everywhere
    prices_E = torch.randn(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    expected = theory.best_balanced_value(scores_TE, top_k)
    assert theory.rebalanced_value(scores_TE, prices_E, top_k) == pytest.approx(expected, abs=2e-6 * tokens * top_k)
    gap = theory.duality_gap(scores_TE, prices_E, top_k)
    assert theory.gap_per_token(scores_TE, prices_E, top_k) == pytest.approx(gap / tokens, abs=2e-6 * top_k)
    assert theory.gap_per_token(scores_TE, prices_E, top_k) >= -1e-9


def test_gap_of_a_sample_uses_as_many_tokens_as_a_whole_load_allows() -> None:
    scores_TE, prices_E = random_scores(3, 30, 8), torch.zeros(8, dtype=torch.float64)
    assert theory.gap_per_token(scores_TE, prices_E, 2) == theory.gap_per_token(scores_TE[:28], prices_E, 2)
    assert theory.gap_per_token(scores_TE[:7], prices_E, 3) != theory.gap_per_token(scores_TE[:8], prices_E, 3)
    assert math.isnan(theory.gap_per_token(scores_TE[:7], prices_E, 3))
    with pytest.raises(ValueError, match="not whole"):
        theory.rebalanced_value(scores_TE[:7], prices_E, 3)


def test_decaying_steps_have_small_regret() -> None:
    """Online, with fresh tokens each step: u/n loses less against the best fixed bias than no balancing does."""
    batches = [random_scores(seed, 64, 8) for seed in range(200)]
    best_E = torch.zeros(8, dtype=torch.float64)
    for _ in range(300):
        load_E = torch.stack([theory.assign(s, best_E, 2).sum(0) for s in batches]).mean(0)
        best_E = best_E + 0.002 * (16 - load_E) / 16

    def regret_of(name: str, rate: float) -> float:
        bias_E, history = torch.zeros(8), []
        for n, scores_TE in enumerate(batches, 1):
            history.append(bias_E.double())
            counts_E = theory.assign(scores_TE, history[-1], 2).sum(0).long()
            bias_E, _ = apply_rule(RULES[name], Loads(counts_E), bias_E, {}, n=n, rate=rate, options=RuleOptions())
        return theory.regret(batches, history, 2, best_E).item()

    unbalanced = theory.regret(batches, [torch.zeros(8, dtype=torch.float64)] * 200, 2, best_E).item()
    assert 0 < regret_of("decay_linear", 0.3) < 0.2 * unbalanced
    assert 0 < regret_of("sign", 0.02) < 0.5 * unbalanced


# Mean MaxVio of the last 200 of 3000 steps on scores that stay the same.
TOY = {("sign", 1e-3): 0.05, ("centered_sign", 1e-3): 0.05, ("rms", 1e-3): 0.05, ("proportional", 1e-2): 0.02,
       ("decay_linear", 1.0): 0.02, ("decay_sqrt", 0.1): 0.02}  # fmt: skip


@pytest.mark.parametrize(("name", "rate"), TOY)
def test_toy_table(name: str, rate: float) -> None:
    from tests.moe.test_rules import balance

    violations = balance(name, rate, 3000)
    assert sum(violations[-200:]) / 200 < TOY[name, rate]
