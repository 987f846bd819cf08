"""Draw what a balancing rule does: `python -m launch.theory --rule sign --rate 1e-3 --out runs/theory`.

Routes the same random scores again and again, or fresh ones each step with --online, while the rule moves the bias, and
follows the dual value, MaxVio and the regret against the best fixed bias. Writes theory.csv and theory.html (one file,
no network).
"""

import argparse
import csv
import math
import sys
from pathlib import Path

import torch

from launch._cli import run_command
from moe import theory
from moe.balance_metrics import max_violation
from moe.router import threshold_histogram
from moe.rules import RULES, Loads, RuleOptions, apply_rule
from trainer.errors import ConfigError

_BEST_STEPS = 400


def main(argv: list[str]) -> int:
    """Simulate and draw; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.theory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rule", default="sign", help=f"one of {', '.join(RULES)}")
    parser.add_argument("--rate", type=float, default=1e-3, help="size of a step (default 1e-3)")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--online", action="store_true", help="fresh scores each step")
    parser.add_argument("--out", type=Path, required=True, help="folder for theory.csv and theory.html")
    options = parser.parse_intermixed_args(argv)
    _check(options)
    rows = simulate(options)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "theory.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, f"{options.rule}, rate {options.rate:g}", options.out / "theory.html")
    last = rows[-1]
    sys.stdout.write(
        f"{options.rule}: MaxVio {rows[0]['maxvio']:.3f} -> {last['maxvio']:.3f}, dual {rows[0]['dual']:.3f} -> "
        f"{last['dual']:.3f}, regret {last['regret']:.3f}; see {options.out / 'theory.html'}\n"
    )
    return 0


def simulate(options: argparse.Namespace) -> list[dict[str, float]]:
    """One row a step: n, dual value a token, MaxVio, and the regret so far a token."""
    generator = torch.Generator().manual_seed(options.seed)
    skew_E = torch.linspace(-1, 1, options.experts)

    def draw_scores() -> torch.Tensor:
        return (torch.randn(options.tokens, options.experts, generator=generator) + skew_E).sigmoid()

    batches = [draw_scores() for _ in range(options.steps if options.online else 1)]
    best_E = best_fixed_bias(batches, options.top_k)
    rule = RULES[options.rule]
    bias_E = torch.full((options.experts,), 1.0 if rule.multiplicative else 0.0)
    state = {name: torch.zeros(options.experts) for name in rule.state}
    everyone, regret, rows = torch.ones(options.tokens, dtype=torch.bool), 0.0, []
    for n in range(1, options.steps + 1):
        scores_TE = batches[(n - 1) % len(batches)]
        # A multiplicative bias has no prices of its own: its selection is that of additive prices s (b - 1) a token.
        biased_TE = scores_TE * bias_E if rule.multiplicative else scores_TE + bias_E
        counts_E = torch.bincount(biased_TE.topk(options.top_k).indices.flatten(), minlength=options.experts)
        prices_E = bias_E - 1 if rule.multiplicative else bias_E
        dual = float(theory.dual_value(scores_TE.double(), prices_E.double(), options.top_k))
        regret += dual - float(theory.dual_value(scores_TE.double(), best_E, options.top_k))
        rows.append(
            {
                "n": n,
                "dual": dual / options.tokens,
                "maxvio": float(max_violation(counts_E)),
                "regret": regret / options.tokens,
            }
        )
        low, high = bias_E.min() - 1, bias_E.max() + 1
        thresholds_EQ = None
        if rule.needs_thresholds:
            thresholds_EQ = threshold_histogram(scores_TE, bias_E, everyone, top_k=options.top_k, low=low, high=high)
        loads = Loads(counts_E, thresholds_EQ, low, high, options.top_k / options.experts)
        bias_E, state = apply_rule(rule, loads, bias_E, state, n=n, rate=options.rate, options=RuleOptions())
    return rows


def best_fixed_bias(batches: list[torch.Tensor], top_k: int) -> torch.Tensor:
    """A bias near the minimum of the mean dual over all batches, by subgradient steps of falling size, float64 [E]."""
    scores_TE = torch.cat(batches[:50]).double()
    best_E = torch.zeros(scores_TE.shape[1], dtype=torch.float64)
    mean = theory.mean_load(scores_TE, top_k)
    for n in range(1, _BEST_STEPS + 1):
        load_E = theory.assign(scores_TE, best_E, top_k).sum(dim=0)
        best_E = best_E + 0.1 / math.sqrt(n) * (mean - load_E) / mean
    return best_E


def draw(rows: list[dict[str, float]], title: str, path: Path) -> None:
    """Three panels over n on log axes, in one self-contained file."""
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=1, cols=3, subplot_titles=["dual value a token", "MaxVio", "regret a token"])
    for column, key in enumerate(("dual", "maxvio", "regret"), start=1):
        figure.add_scatter(x=[r["n"] for r in rows], y=[r[key] for r in rows], name=key, row=1, col=column)
        figure.update_xaxes(type="log", title_text="n", row=1, col=column)
    figure.update_yaxes(type="log", row=1, col=2)
    figure.update_yaxes(type="log", row=1, col=3)
    figure.update_layout(title=title, showlegend=False)
    figure.write_html(path, include_plotlyjs=True)


def _check(options: argparse.Namespace) -> None:
    problems = []
    if options.rule not in RULES:
        problems.append(f"--rule: '{options.rule}' does not exist; choose one of {', '.join(RULES)}")
    if not (math.isfinite(options.rate) and options.rate >= 0):
        problems.append(f"--rate: {options.rate} must be finite and not negative")
    if min(options.steps, options.tokens) < 1:
        problems.append("--steps and --tokens must be at least 1")
    if not 1 <= options.top_k < options.experts:
        problems.append(f"--top-k: {options.top_k} must be between 1 and experts - 1 ({options.experts - 1})")
    if problems:
        raise ConfigError(*problems)


if __name__ == "__main__":
    sys.exit(run_command(main))
