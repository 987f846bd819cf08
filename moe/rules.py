"""Balancing rules: how the bias of one layer follows the loads of its experts. Pure functions of tensors.

A rule gets what one whole optimizer step did (summed over ranks and micro-batches) and returns the new bias. Most work
on the relative error e_i = (mean - c_i) / mean: positive for an expert with too little work, down to -(E - 1) for one
that has everything. A layer that saw no token keeps its bias and its state.

| name | update | scale of the error |
|---|---|---|
| sign | b + u sign(e) | none: every step is u (Wang et al. 2024, arXiv 2408.15664, algorithm 1) |
| centered_sign | the same, less the mean of the step, so that the mean bias does not drift | none |
| proportional | b + u e | relative to the mean load |
| rms | b + u e / RMS(e) | its own root mean square: steps are u on average |
| decay_sqrt | b + u / sqrt(n) e | relative to the mean load |
| decay_linear | b + u / n e | relative to the mean load |
| smebu | d = u tanh(kappa e), centred; m = beta m + (1 - beta) d; b + m | saturates at u |
| pid | b + u times the change of kp e + ki sum(e) + kd (e - previous e), the sum limited | relative to the mean load |
| multiplicative | b + u sign(e) with selection by s * b, b from 1 | none |
| quantile | the exact dual step, no rate: the k/E-quantile over tokens of alpha_i - s_ij, centred | scores |
| bip | the same limited to b <= 0 and alpha >= 0, one dual iteration a step | scores |

`quantile` and `bip` solve for the bias instead of stepping towards it. alpha_i is the (k+1)-th largest biased score of
token i, so expert j would just be chosen by token i if b_j were alpha_i - s_ij; they see the distribution of these
thresholds as a histogram. Both use this step's tokens for the next step's bias only: using them at once would leak
future tokens into the selection.

Shape letters: E experts, Q bins of the threshold histogram.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

State = dict[str, Tensor]


class Loads(NamedTuple):
    """What a layer did in one optimizer step."""

    counts_E: Tensor
    """Tokens routed to each expert, int64."""
    thresholds_EQ: Tensor | None = None
    """Histogram of alpha_i - s_ij over tokens for each expert, int64; only for rules that ask for it."""
    low: Tensor | float = 0.0
    """Lower edge of the histogram."""
    high: Tensor | float = 0.0
    """Upper edge of the histogram."""
    share: float = 0.0
    """Share of tokens that each expert should get, k / E."""


@dataclass(frozen=True, kw_only=True)
class RuleOptions:
    """Constants of single rules; other rules ignore them, and the config refuses one that its rule would ignore."""

    floor: float = 0.0
    """decay_sqrt, decay_linear: smallest rate, for routers that keep moving."""
    kappa: float = 2.0
    """smebu: slope of the tanh."""
    beta: float = 0.5
    """smebu: decay of the momentum."""
    kp: float = 1.0
    """pid: proportional gain."""
    ki: float = 1.0
    """pid: integral gain."""
    kd: float = 0.0
    """pid: derivative gain."""
    windup: float = 100.0
    """pid: largest absolute integral."""
    ema: float = 0.0
    """quantile, bip: weight of the old bias in the new one."""


Update = Callable[[Loads, Tensor, Mapping[str, Tensor], int, float, RuleOptions], tuple[Tensor, State]]
"""(loads, bias_E, state, n, rate, options) -> (bias_E, state); n counts updates from 1, everything is float32."""


class Rule(NamedTuple):
    """One balancing rule."""

    update: Update
    state: tuple[str, ...] = ()
    """Names of the [E] tensors it carries from step to step; they start at zero."""
    multiplicative: bool = False
    """Selection by s * b with b from 1, instead of s + b with b from 0."""
    needs_thresholds: bool = False
    """Whether `Loads` must hold the threshold histogram."""
    least_alpha: float = -math.inf
    """Lower limit of alpha_i in that histogram."""
    options: tuple[str, ...] = ()
    """Fields of RuleOptions it reads."""


def relative_error(counts_E: Tensor) -> Tensor:
    """(mean - c) / mean, float32 [E]; all zero if no token was routed."""
    counts_E = counts_E.double()  # loads of a large batch exceed what float32 counts exactly
    mean = counts_E.mean()
    return torch.where(mean > 0, (mean - counts_E) / mean.clamp(min=1e-300), 0.0).float()


def sign(
    loads: Loads, bias_E: Tensor, state: Mapping[str, Tensor], n: int, rate: float, o: RuleOptions
) -> tuple[Tensor, State]:
    """b + u sign(e)."""
    return bias_E + rate * relative_error(loads.counts_E).sign(), {}


def centered_sign(
    loads: Loads, bias_E: Tensor, state: Mapping[str, Tensor], n: int, rate: float, o: RuleOptions
) -> tuple[Tensor, State]:
    """b + d - mean(d), d = u sign(e). Selection sees differences of biases only, so this is sign without its drift."""
    step_E = rate * relative_error(loads.counts_E).sign()
    return bias_E + (step_E - step_E.mean()), {}


def proportional(
    loads: Loads, bias_E: Tensor, state: Mapping[str, Tensor], n: int, rate: float, o: RuleOptions
) -> tuple[Tensor, State]:
    """b + u e."""
    return bias_E + rate * relative_error(loads.counts_E), {}


def rms(
    loads: Loads, bias_E: Tensor, state: Mapping[str, Tensor], n: int, rate: float, o: RuleOptions
) -> tuple[Tensor, State]:
    """b + u e / RMS(e)."""
    error_E = relative_error(loads.counts_E)
    size = error_E.square().mean().sqrt()
    return bias_E + rate * torch.where(size > 0, error_E / size.clamp(min=1e-30), 0.0), {}


def decay_sqrt(
    loads: Loads, bias_E: Tensor, state: Mapping[str, Tensor], n: int, rate: float, o: RuleOptions
) -> tuple[Tensor, State]:
    """b + max(u / sqrt(n), floor) e (Han & Zhong 2025, arXiv 2512.03915)."""
    return bias_E + max(rate / n**0.5, o.floor) * relative_error(loads.counts_E), {}


def decay_linear(
    loads: Loads, bias_E: Tensor, state: Mapping[str, Tensor], n: int, rate: float, o: RuleOptions
) -> tuple[Tensor, State]:
    """b + max(u / n, floor) e (Han & Zhong 2025, arXiv 2512.03915)."""
    return bias_E + max(rate / n, o.floor) * relative_error(loads.counts_E), {}


def smebu(
    loads: Loads, bias_E: Tensor, state: Mapping[str, Tensor], n: int, rate: float, o: RuleOptions
) -> tuple[Tensor, State]:
    """d = u tanh(kappa e), d -= mean(d), m = beta m + (1 - beta) d, b + m."""
    step_E = rate * (o.kappa * relative_error(loads.counts_E)).tanh()
    momentum_E = o.beta * state["momentum"] + (1 - o.beta) * (step_E - step_E.mean())
    return bias_E + momentum_E, {"momentum": momentum_E}


def pid(
    loads: Loads, bias_E: Tensor, state: Mapping[str, Tensor], n: int, rate: float, o: RuleOptions
) -> tuple[Tensor, State]:
    """b + u (y - y'), y = kp e + ki I + kd (e - e'), I = clamp(I + e); primes are of the update before, at first zero.

    With one rate all along the bias is where it began plus u y. Adding up changes of the output, not setting the bias
    to it, keeps what other rules or weights brought, and a falling rate slows the bias down instead of shrinking it.
    """
    error_E = relative_error(loads.counts_E)
    integral_E = (state["integral"] + error_E).clamp(-o.windup, o.windup)
    change_E = error_E - state["previous"] if n > 1 else torch.zeros_like(error_E)
    before_E = o.kp * state["previous"] + o.ki * state["integral"] + o.kd * state["change"]
    after_E = o.kp * error_E + o.ki * integral_E + o.kd * change_E
    return bias_E + rate * (after_E - before_E), {"integral": integral_E, "previous": error_E, "change": change_E}


def quantile(
    loads: Loads, bias_E: Tensor, state: Mapping[str, Tensor], n: int, rate: float, o: RuleOptions
) -> tuple[Tensor, State]:
    """b_j = the k/E-quantile over tokens of alpha_i - s_ij, less the mean over experts."""
    solved_E = _threshold_quantile(loads)
    return _blend(bias_E, solved_E - solved_E.mean(), o.ema), {}


def bip(
    loads: Loads, bias_E: Tensor, state: Mapping[str, Tensor], n: int, rate: float, o: RuleOptions
) -> tuple[Tensor, State]:
    """b_j = min(0, k/E-quantile): the dual prices of "at most its share" have one sign (Sun 2025, arXiv 2502.15451).

    So have those of "at most k experts": alpha_i = max(0, (k+1)-th largest biased score). Without that limit the biases
    would fall for ever, for nothing else says how low all of them together may be.
    The T dual iterations that the method makes on one batch are spread over T steps, each on its own batch.
    """
    return _blend(bias_E, _threshold_quantile(loads).clamp(max=0.0), o.ema), {}


def _threshold_quantile(loads: Loads) -> Tensor:
    """The `share`-quantile of each expert's threshold histogram, linear within a bin, float32 [E]."""
    assert loads.thresholds_EQ is not None
    bins = loads.thresholds_EQ.shape[1]
    cumulative_EQ = loads.thresholds_EQ.double().cumsum(dim=1)
    wanted_E1 = loads.share * cumulative_EQ[:, -1:]
    bin_E1 = torch.searchsorted(cumulative_EQ, wanted_E1).clamp(max=bins - 1)
    inside_E1 = loads.thresholds_EQ.gather(1, bin_E1).double().clamp(min=1)
    before_E1 = cumulative_EQ.gather(1, bin_E1) - loads.thresholds_EQ.gather(1, bin_E1)
    position_E = (bin_E1 + (wanted_E1 - before_E1) / inside_E1).squeeze(1)
    return (loads.low + (loads.high - loads.low) * position_E / bins).float()


def _blend(old_E: Tensor, new_E: Tensor, ema: float) -> Tensor:
    return ema * old_E + (1 - ema) * new_E


RULES: dict[str, Rule] = {
    "sign": Rule(sign),
    "centered_sign": Rule(centered_sign),
    "proportional": Rule(proportional),
    "rms": Rule(rms),
    "decay_sqrt": Rule(decay_sqrt, options=("floor",)),
    "decay_linear": Rule(decay_linear, options=("floor",)),
    "smebu": Rule(smebu, state=("momentum",), options=("kappa", "beta")),
    "pid": Rule(pid, state=("integral", "previous", "change"), options=("kp", "ki", "kd", "windup")),
    "multiplicative": Rule(sign, multiplicative=True),
    "quantile": Rule(quantile, needs_thresholds=True, options=("ema",)),
    "bip": Rule(bip, needs_thresholds=True, least_alpha=0.0, options=("ema",)),
}


def multiplies(rule: object) -> bool:
    """Whether biases of a rule of this name multiply the scores. Without a rule (`none`) they are added."""
    return isinstance(rule, str) and rule in RULES and RULES[rule].multiplicative


def apply_rule(
    rule: Rule, loads: Loads, bias_E: Tensor, state: Mapping[str, Tensor], *, n: int, rate: float, options: RuleOptions
) -> tuple[Tensor, State]:
    """One update of one layer, or none if the layer saw no token: then bias and state stay as they are."""
    new_bias_E, new_state = rule.update(loads, bias_E, state, n, rate, options)
    saw_tokens = loads.counts_E.sum() > 0
    return torch.where(saw_tokens, new_bias_E, bias_E), {
        name: torch.where(saw_tokens, value, state[name]) for name, value in new_state.items()
    }
