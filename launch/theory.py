"""Draw what a balancing rule does: `python -m launch.theory --rule sign --rate 1e-3 --out runs/theory`.

Routes the same tokens again and again, or fresh ones each step with --online, while the rule moves the bias, and
follows the dual value, the duality gap, MaxVio and the regret against the best fixed bias. Scores are drawn at random,
or recorded ones: `python -m launch.evaluate RUN --record-scores FILE`, then --scores FILE --layer 0. Writes theory.csv,
theory.png and theory.html (one file, no network). A multiplicative rule is followed on the logarithm of the scores,
where its factors are prices.
"""

import argparse
import csv
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from launch._cli import run_command
from moe import theory
from moe.balance_metrics import max_violation
from moe.router import threshold_histogram
from moe.rules import RULES, Loads, RuleOptions, apply_rule
from moe.score_sample import load_scores
from trainer.errors import ConfigError

PANELS = {
    "dual": "dual value a token",
    "gap": "duality gap a token",
    "maxvio": "MaxVio",
    "regret": "regret a token, summed over steps",
}
_ON_LOG_AXIS = ("gap", "maxvio", "regret")

_BEST_STEPS, _BEST_BATCHES = 100, 50
_GAPS = 60
_SYNTHETIC = {"tokens": 512, "experts": 16, "top_k": 4, "seed": 0}

Row = dict[str, float | None]


class Source(NamedTuple):
    """Scores to route, one batch of tokens a step and then from the start again."""

    batches: list[Tensor]
    top_k: int
    name: str


def main(argv: list[str]) -> int:
    """Simulate and draw; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.theory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rule", default="sign", help=f"one of {', '.join(RULES)}")
    parser.add_argument("--rate", type=float, default=1e-3, help="size of a step (default 1e-3)")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument(
        "--tokens", type=int, help="tokens of a step (default 512); the gap of thousands takes many minutes"
    )
    parser.add_argument("--experts", type=int, help="of random scores (default 16)")
    parser.add_argument("--top-k", type=int, help="experts a token uses (default 4, or as recorded)")
    parser.add_argument("--seed", type=int, help="of random scores (default 0)")
    parser.add_argument("--scores", type=Path, metavar="FILE", help="recorded scores instead of random ones")
    parser.add_argument("--layer", type=int, default=0, help="MoE layer of the recorded scores (default 0)")
    parser.add_argument("--online", action="store_true", help="fresh scores each step")
    parser.add_argument("--out", type=Path, required=True, help="folder for theory.csv, theory.png and theory.html")
    options = parser.parse_intermixed_args(argv)
    _check(options)
    source = recorded_source(options) if options.scores else random_source(options)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = simulate(source, options.rule, options.rate, options.steps)
    with (options.out / "theory.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    title = f"{options.rule}, rate {options.rate:g}, {source.name}"
    draw_html(rows, title, options.out / "theory.html")
    draw_png(rows, title, options.out / "theory.png")
    first, last = rows[0], rows[-1]
    sys.stdout.write(
        f"{title}: MaxVio {first['maxvio']:.3f} -> {last['maxvio']:.3f}, dual {first['dual']:.3f} -> "
        f"{last['dual']:.3f}, gap {first['gap']:.2e} -> {last['gap']:.2e}, regret {last['regret']:.3f}; "
        f"see {options.out / 'theory.html'}\n"
    )
    return 0


def random_source(options: argparse.Namespace) -> Source:
    """Sigmoid scores with some experts liked better than others; a batch for each step if online, else one."""
    generator = torch.Generator().manual_seed(options.seed)
    skew_E = torch.linspace(-1, 1, options.experts)
    batches = [
        (torch.randn(options.tokens, options.experts, generator=generator) + skew_E).sigmoid()
        for _ in range(options.steps if options.online else 1)
    ]
    return Source(batches, options.top_k, "random scores")


def recorded_source(options: argparse.Namespace) -> Source:
    """A layer of a file of recorded scores, cut into batches if online.

    Raises ConfigError if the file does not have what the options ask for.
    """
    recorded = load_scores(options.scores)
    scores_TE = recorded.layers.get(options.layer)
    if scores_TE is None:
        there = ", ".join(map(str, recorded.layers))
        raise ConfigError(f"--layer: {options.scores} has no layer {options.layer}; it has {there}")
    tokens, experts = scores_TE.shape
    size = options.tokens or min(_SYNTHETIC["tokens"], tokens)
    top_k = options.top_k or recorded.top_k
    if size > tokens:
        raise ConfigError(f"--tokens: {options.scores} has {tokens} tokens, not {size}")
    if not 1 <= top_k < experts:
        raise ConfigError(f"--top-k: {top_k} must be between 1 and experts - 1 ({experts - 1})")
    if RULES[options.rule].needs_thresholds and not 0 <= float(scores_TE.min()) <= float(scores_TE.max()) <= 1:
        raise ConfigError(f"--rule: {options.rule} needs scores in [0, 1]; {options.scores} has others")
    batches = list(scores_TE.split(size))[: tokens // size if options.online else 1]
    return Source(batches, top_k, f"layer {options.layer} of {options.scores.name}")


def simulate(source: Source, rule_name: str, rate: float, steps: int) -> list[Row]:
    """One row a step: n, dual value and duality gap a token, MaxVio, and the regret so far a token.

    The gap, which costs an assignment, is there at steps spread evenly over log n; elsewhere it is None.
    """
    rule, top_k = RULES[rule_name], source.top_k
    experts = source.batches[0].shape[1]
    # The TopK of s b is the TopK of log s + log b.
    values = [_logarithm(s_TE) if rule.multiplicative else s_TE.double() for s_TE in source.batches]
    best_E = best_fixed_bias(values, top_k)
    bias_E = torch.full((experts,), 1.0 if rule.multiplicative else 0.0)
    state = {name: torch.zeros(experts) for name in rule.state}
    with_gap = {round(steps ** (i / (_GAPS - 1))) for i in range(_GAPS)}
    regret = 0.0
    rows: list[Row] = []
    for n in range(1, steps + 1):
        number = (n - 1) % len(values)
        scores_TE, value_TE = source.batches[number], values[number]
        prices_E = _logarithm(bias_E) if rule.multiplicative else bias_E.double()
        counts_E = theory.assign(value_TE, prices_E, top_k).sum(dim=0).long()
        dual = float(theory.dual_value(value_TE, prices_E, top_k)) / len(value_TE)
        regret += dual - float(theory.dual_value(value_TE, best_E, top_k)) / len(value_TE)
        gap = theory.gap_per_token(value_TE, prices_E, top_k) if n in with_gap else None
        rows.append({"n": n, "dual": dual, "gap": gap, "maxvio": float(max_violation(counts_E)), "regret": regret})
        low, high = bias_E.min() - 1, bias_E.max() + 1
        thresholds_EQ = None
        if rule.needs_thresholds:
            everyone = torch.ones(len(scores_TE), dtype=torch.bool)
            thresholds_EQ = threshold_histogram(
                scores_TE, bias_E, everyone, top_k=top_k, low=low, high=high, least_alpha=rule.least_alpha
            )
        loads = Loads(counts_E, thresholds_EQ, low, high, top_k / experts)
        bias_E, state = apply_rule(rule, loads, bias_E, state, n=n, rate=rate, options=RuleOptions())
    return rows


def best_fixed_bias(batches: list[Tensor], top_k: int) -> Tensor:
    """A bias near the minimum of the mean dual over the batches, float64 [E].

    By subgradient steps of falling size, measured by the spread of the scores; the best point of each round starts the
    next, with smaller steps. Of many batches it takes some, spread over the run.
    """
    values_TE = torch.cat(batches[:: -(-len(batches) // _BEST_BATCHES)])
    mean, spread = theory.mean_load(values_TE, top_k), float(values_TE.std())
    best_E = torch.zeros(values_TE.shape[1], dtype=torch.float64)
    lowest = math.inf
    for size in (1.0, 0.1, 0.01):
        prices_E = best_E
        for n in range(1, _BEST_STEPS + 1):
            dual = float(theory.dual_value(values_TE, prices_E, top_k))
            if dual < lowest:
                lowest, best_E = dual, prices_E
            load_E = theory.assign(values_TE, prices_E, top_k).sum(dim=0)
            prices_E = prices_E + size * spread / math.sqrt(n) * (mean - load_E) / mean
    return best_E


def draw_html(rows: list[Row], title: str, path: Path) -> None:
    """Four panels over n on log axes, in one self-contained file."""
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=2, cols=2, subplot_titles=list(PANELS.values()))
    for i, key in enumerate(PANELS):
        place = {"row": i // 2 + 1, "col": i % 2 + 1}
        x, y = _points(rows, key)
        figure.add_scatter(x=x, y=y, name=key, **place)
        figure.update_xaxes(type="log", title_text="n", **place)
        if key in _ON_LOG_AXIS:
            figure.update_yaxes(type="log", **place)
    figure.update_layout(title=title, showlegend=False, height=900)
    figure.write_html(path, include_plotlyjs=True, config={"displaylogo": False})


def draw_png(rows: list[Row], title: str, path: Path) -> None:
    """The same four panels as a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, (key, label) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        axes.plot(*_points(rows, key))
        axes.set(title=label, xlabel="n", xscale="log", yscale="log" if key in _ON_LOG_AXIS else "linear")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _points(rows: list[Row], key: str) -> tuple[list[float], list[float]]:
    """What can be drawn: a value of zero or less has no place on a log axis."""
    points = [(row["n"], row[key]) for row in rows]
    kept = [(n, y) for n, y in points if n is not None and y is not None and (key not in _ON_LOG_AXIS or y > 0)]
    return [n for n, _ in kept], [y for _, y in kept]


def _logarithm(values: Tensor) -> Tensor:
    return values.double().clamp(min=1e-30).log()


def _check(options: argparse.Namespace) -> None:
    problems = []
    if options.rule not in RULES:
        problems.append(f"--rule: '{options.rule}' does not exist; choose one of {', '.join(RULES)}")
    if not (math.isfinite(options.rate) and options.rate >= 0):
        problems.append(f"--rate: {options.rate} must be finite and not negative")
    if options.steps < 1:
        problems.append(f"--steps: {options.steps} must be at least 1")
    if options.tokens is not None and options.tokens < 1:
        problems.append(f"--tokens: {options.tokens} must be at least 1")
    if options.scores:
        problems += [
            f"--{name}: is for random scores, not for recorded ones; remove it"
            for name in ("experts", "seed")
            if getattr(options, name) is not None
        ]
    else:
        for name, default in _SYNTHETIC.items():
            if getattr(options, name) is None:
                setattr(options, name, default)
        if not 0 <= options.seed < 2**32:
            problems.append(f"--seed: {options.seed} must be in [0, 2^32)")
        if not 1 <= options.top_k < options.experts:
            problems.append(f"--top-k: {options.top_k} must be between 1 and experts - 1 ({options.experts - 1})")
    if problems:
        raise ConfigError(*problems)


if __name__ == "__main__":
    sys.exit(run_command(main))
