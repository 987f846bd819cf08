"""Balancing rules: golden values and laws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.balance_metrics import dead_experts, load_entropy, max_violation
from moe.bias_hook import RateSchedule, rate_factor
from moe.router import threshold_histogram
from moe.rules import RULES, Loads, RuleOptions, apply_rule, relative_error

loads = st.lists(st.integers(0, 2**40), min_size=2, max_size=64).map(lambda values: torch.tensor(values))


def update(
    name: str, counts: list[int] | torch.Tensor, bias_E: torch.Tensor, rate: float, **options: float
) -> torch.Tensor:
    """The first update of a rule from its initial state."""
    counts_E = torch.as_tensor(counts)
    state = {key: torch.zeros(counts_E.numel()) for key in RULES[name].state}
    loads = Loads(counts_E)
    return apply_rule(RULES[name], loads, bias_E, state, n=1, rate=rate, options=RuleOptions(**options))[0]


STEPPING = [name for name, rule in RULES.items() if not rule.needs_thresholds]

# Bias after one update from zero, loads 4 3 1 8, rate 0.1. Relative errors are 0, 1/4, 3/4, -1.
GOLDEN = {
    "sign": [0.0, 0.1, 0.1, -0.1],
    "centered_sign": [-0.025, 0.075, 0.075, -0.125],
    "proportional": [0.0, 0.025, 0.075, -0.1],
    "rms": [0.0, 0.0392232, 0.1176697, -0.1568929],
    "decay_sqrt": [0.0, 0.025, 0.075, -0.1],
    "decay_linear": [0.0, 0.025, 0.075, -0.1],
    "smebu": [-0.0051, 0.0181, 0.0402, -0.0532],
    "pid": [0.0, 0.05, 0.15, -0.2],
    "multiplicative": [0.0, 0.1, 0.1, -0.1],
}


@pytest.mark.parametrize("name", STEPPING)
def test_golden_values(name: str) -> None:
    tolerance = 1e-4 if name == "smebu" else 1e-6
    assert update(name, [4, 3, 1, 8], torch.zeros(4), 0.1).tolist() == pytest.approx(GOLDEN[name], abs=tolerance)


def test_decaying_rates_and_their_floor() -> None:
    loads, bias_E = Loads(torch.tensor([0, 2])), torch.zeros(2)

    def after(name: str, n: int, floor: float = 0.0) -> float:
        options = RuleOptions(floor=floor)
        return apply_rule(RULES[name], loads, bias_E, {}, n=n, rate=0.1, options=options)[0][0].item()

    assert after("decay_sqrt", 4) == pytest.approx(0.05)
    assert after("decay_linear", 4) == pytest.approx(0.025)
    assert after("decay_linear", 10**6, floor=0.01) == pytest.approx(0.01)


def test_momentum_and_integral_are_carried() -> None:
    counts_E, bias_E = torch.tensor([4, 3, 1, 8]), torch.zeros(4)
    state: dict[str, torch.Tensor] = {"momentum": torch.zeros(4)}
    steps = []
    for n in (1, 2):
        new_E, state = apply_rule(RULES["smebu"], Loads(counts_E), bias_E, state, n=n, rate=0.1, options=RuleOptions())
        steps.append(new_E - bias_E)
        bias_E = new_E
    torch.testing.assert_close(steps[1], 1.5 * steps[0])
    state = {name: torch.zeros(4) for name in RULES["pid"].state}
    for n in range(1, 200):
        bias_E, state = apply_rule(
            RULES["pid"], Loads(counts_E), bias_E, state, n=n, rate=0.1, options=RuleOptions(windup=5.0)
        )
    assert state["integral"].tolist() == pytest.approx([0.0, 5.0, 5.0, -5.0]), "the sum stops at the wind-up limit"


def test_pid_adds_to_the_bias_it_finds() -> None:
    """With a constant rate it is the textbook controller plus the bias it began with; rate 0 holds any bias."""
    start_E = torch.tensor([0.5, -0.3, 0.2, -0.4])
    bias_E, state = start_E, {name: torch.zeros(4) for name in RULES["pid"].state}
    options, errors = RuleOptions(kp=1.5, ki=0.5, kd=0.25, windup=1.0), []
    for n, counts in enumerate([[4, 3, 1, 8], [5, 3, 2, 6], [2, 8, 3, 3]], 1):
        loads = Loads(torch.tensor(counts))
        held_E, _ = apply_rule(RULES["pid"], loads, bias_E, state, n=n, rate=0.0, options=options)
        assert torch.equal(held_E, bias_E)
        bias_E, state = apply_rule(RULES["pid"], loads, bias_E, state, n=n, rate=0.1, options=options)
        errors.append(relative_error(loads.counts_E))
    integral_E = torch.zeros(4)
    for error_E in errors:
        integral_E = (integral_E + error_E).clamp(-1, 1)
    output_E = 1.5 * errors[-1] + 0.5 * integral_E + 0.25 * (errors[-1] - errors[-2])
    torch.testing.assert_close(bias_E, start_E + 0.1 * output_E)


def test_error_is_exact_beyond_float32_integers() -> None:
    counts_E = torch.tensor([2**30 + 1, 2**30, 2**30, 2**30 - 1])  # float32 cannot tell these apart
    assert relative_error(counts_E).sign().tolist() == [-1.0, 0.0, 0.0, 1.0]


@given(counts_E=loads, rate=st.floats(1e-6, 1.0))
def test_overloaded_experts_fall_and_underloaded_rise(counts_E: torch.Tensor, rate: float) -> None:
    mean = counts_E.double().mean()
    for name in ("sign", "proportional", "rms", "decay_sqrt", "decay_linear", "pid", "multiplicative"):
        step_E = update(name, counts_E, torch.zeros(counts_E.numel()), rate)
        assert not (step_E[counts_E.double() > mean] > 0).any()
        assert not (step_E[counts_E.double() < mean] < 0).any()


@given(counts_E=loads, rate=st.floats(1e-6, 1.0))
def test_centred_rules_keep_the_mean(counts_E: torch.Tensor, rate: float) -> None:
    for name in ("centered_sign", "smebu"):
        step_E = update(name, counts_E, torch.zeros(counts_E.numel()), rate)
        assert abs(step_E.double().mean().item()) <= 1e-6 * rate
    plain_E = update("sign", counts_E, torch.zeros(counts_E.numel()), rate)
    centred_E = update("centered_sign", counts_E, torch.zeros(counts_E.numel()), rate)
    torch.testing.assert_close(centred_E - centred_E[0], plain_E - plain_E[0], rtol=1e-4, atol=1e-6 * rate)


@pytest.mark.parametrize("name", RULES)
def test_a_layer_without_tokens_keeps_bias_and_state(name: str) -> None:
    bias_E = torch.tensor([0.1, -0.2, 0.3])
    state = {key: torch.tensor([1.0, 2.0, 3.0]) for key in RULES[name].state}
    empty = Loads(torch.zeros(3, dtype=torch.int64), torch.zeros(3, 10, dtype=torch.int64), 0.0, 1.0, 1 / 3)
    new_E, new_state = apply_rule(RULES[name], empty, bias_E, state, n=5, rate=0.5, options=RuleOptions())
    assert torch.equal(new_E, bias_E)
    for key, value in new_state.items():
        assert torch.equal(value, state[key])


@pytest.mark.parametrize("name", ["sign", "centered_sign", "proportional", "rms", "multiplicative"])
def test_perfect_balance_moves_nothing(name: str) -> None:
    bias_E = torch.tensor([0.1, -0.2, 0.3])
    assert torch.equal(update(name, torch.full((3,), 7), bias_E, 0.5), bias_E)


def balance(
    name: str, rate: float, steps: int, tokens: int = 512, experts: int = 16, top_k: int = 4, shape: str = "constant"
) -> list[float]:
    """MaxVio before each update of a rule on scores that stay the same."""
    schedule = RateSchedule(shape=shape)  # type: ignore[arg-type]
    torch.manual_seed(0)
    scores_NE = (torch.randn(tokens, experts) + torch.linspace(-1, 1, experts)).sigmoid()
    rule = RULES[name]
    bias_E = torch.full((experts,), 1.0 if rule.multiplicative else 0.0)
    state: dict[str, torch.Tensor] = {key: torch.zeros(experts) for key in rule.state}
    everyone, violations = torch.ones(tokens, dtype=torch.bool), []
    for n in range(1, steps + 1):
        biased_NE = scores_NE * bias_E if rule.multiplicative else scores_NE + bias_E
        counts_E = torch.bincount(biased_NE.topk(top_k).indices.flatten(), minlength=experts)
        violations.append(max_violation(counts_E).item())
        low, high = bias_E.min() - 1, bias_E.max() + 1
        thresholds_EQ = None
        if rule.needs_thresholds:
            thresholds_EQ = threshold_histogram(
                scores_NE, bias_E, everyone, top_k=top_k, low=low, high=high, least_alpha=rule.least_alpha
            )
        loads = Loads(counts_E, thresholds_EQ, low, high, top_k / experts)
        bias_E, state = apply_rule(
            rule, loads, bias_E, state, n=n, rate=rate * rate_factor(schedule, n - 1, steps), options=RuleOptions()
        )
    return violations


RATES = {"sign": 2e-3, "centered_sign": 2e-3, "rms": 2e-3, "smebu": 5e-3, "pid": 5e-3, "multiplicative": 2e-3,
         "proportional": 1e-2, "decay_sqrt": 0.1, "decay_linear": 1.0, "quantile": 0.0, "bip": 0.0}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_static_scores_get_balanced(name: str) -> None:
    violations = balance(name, RATES[name], 600)
    assert violations[0] > 0.8
    assert sum(violations[-50:]) / 50 < (0.15 if name == "bip" else 0.06)


@pytest.mark.parametrize("name", ["sign", "proportional", "smebu", "pid"])
def test_balance_outlasts_a_rate_that_falls_to_zero(name: str) -> None:
    violations = balance(name, RATES[name], 600, shape="cosine")
    assert violations[0] > 0.8
    assert sum(violations[-50:]) / 50 < 0.06


def test_quantile_solves_in_a_few_steps_what_sign_walks_to() -> None:
    solved = balance("quantile", 0.0, 6)
    assert solved[0] > 0.8
    assert solved[5] < 0.15
    assert balance("sign", 2e-3, 6)[5] > 0.6


def test_bip_has_a_floor() -> None:
    """Prices of both kinds are at least 0, so no bias has a reason to be below minus the largest score."""
    torch.manual_seed(0)
    offsets_E, bias_E, violations, lowest = torch.randn(16), torch.zeros(16), [], []
    rule = RULES["bip"]
    for n in range(1, 1001):
        scores_NE = (torch.randn(128, 16) + offsets_E).sigmoid()
        counts_E = torch.bincount((scores_NE + bias_E).topk(2).indices.flatten(), minlength=16)
        violations.append(max_violation(counts_E).item())
        low, high = bias_E.min() - 1, bias_E.max() + 1
        everyone = torch.ones(128, dtype=torch.bool)
        histogram_EQ = threshold_histogram(
            scores_NE, bias_E, everyone, top_k=2, low=low, high=high, least_alpha=rule.least_alpha
        )
        loads = Loads(counts_E, histogram_EQ, low, high, 2 / 16)
        bias_E, _ = apply_rule(rule, loads, bias_E, {}, n=n, rate=0.0, options=RuleOptions())
        lowest.append(bias_E.min().item())
    assert min(lowest) >= -1.001
    assert bias_E.max() <= 0
    assert sum(violations[-100:]) < 1.2 * sum(violations[100:200]), "as balanced in the end as it soon was"


def test_threshold_quantile_gives_each_expert_its_share() -> None:
    """With alpha fixed, a bias at the k/E-quantile of alpha_i - s_ij is exceeded by exactly that share of tokens."""
    torch.manual_seed(0)
    thresholds_NE = torch.rand(4000, 5) * torch.arange(1, 6)
    histogram_EQ = torch.stack([torch.histc(t, 1000, 0, 6).long() for t in thresholds_NE.unbind(1)])
    loads = Loads(torch.ones(5), histogram_EQ, 0.0, 6.0, 0.3)
    options = RuleOptions()
    bias_E, _ = RULES["bip"].update(loads, torch.zeros(5), {}, 1, 0.0, options)
    assert not bias_E.any(), "positive prices are cut off"
    bias_E, _ = RULES["quantile"].update(loads, torch.zeros(5), {}, 1, 0.0, options)
    shifted = thresholds_NE.quantile(0.3, dim=0)
    assert bias_E.tolist() == pytest.approx((shifted - shifted.mean()).tolist(), abs=0.006)


def test_metrics_on_known_loads() -> None:
    counts_E = torch.tensor([4, 3, 1, 8, 0])
    assert max_violation(counts_E).item() == pytest.approx((8 - 3.2) / 3.2)
    assert dead_experts(counts_E).item() == 1
    assert load_entropy(torch.tensor([5, 5, 5, 5])).item() == pytest.approx(1.0)
    assert load_entropy(torch.tensor([9, 0, 0])).item() == pytest.approx(0.0)
    assert max_violation(torch.full((8,), 3)).item() == 0.0


@given(counts_E=loads.filter(lambda counts: counts.sum() > 0))
def test_metrics_stay_in_range(counts_E: torch.Tensor) -> None:
    experts = counts_E.numel()
    assert -1e-12 <= max_violation(counts_E).item() <= experts - 1 + 1e-9
    assert -1e-12 <= load_entropy(counts_E).item() <= 1 + 1e-12
    assert 0 <= dead_experts(counts_E).item() < experts
