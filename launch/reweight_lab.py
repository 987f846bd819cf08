"""What a way of weighing does, drawn: `python -m launch.reweight_lab --strategy linupper --temperature 0.4 --out DIR`.

Draws weight against loss and effective sample size against temperature for each strategy asked for, beside the shipped
ones; how they converge on a convex toy, with its bound; and, with --replay RUN, what they would have made of the
losses that a run recorded (hooks.sample_reweight.record_every): "what would Quadratic at r = 0.4 have done?".
Writes lab.html (one file, no network), curves.csv, toy.csv and replay.csv, and prints the replay as a table.
"""

import argparse
import csv
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from launch._cli import run_command
from launch._console import terminal
from reweighting.reference import ReferenceConfig, batch_range
from reweighting.strategies import STRATEGIES, Strategy, find_strategy
from reweighting.theory import Descent, descend, smallest_temperature_for_cap, toy_quadratics
from reweighting.weighing import divergence, effective_sample_size, sample_weights
from trainer.errors import ConfigError
from trainer.metrics import iter_jsonl

_TOY_STEPS = 400
_SAMPLES = 257


class Way(NamedTuple):
    """One way of weighing."""

    name: str
    strategy: Strategy
    temperature: float
    options: argparse.Namespace

    @property
    def label(self) -> str:
        return f"{self.name}, r = {self.temperature:g}"

    def weigh(self, losses_B: Tensor, valid_B: Tensor | None = None) -> Tensor:
        """Weights of a batch, [B]."""
        valid_B = torch.ones(losses_B.shape, dtype=torch.bool) if valid_B is None else valid_B
        ends = batch_range(losses_B, valid_B, self.options.quantile)
        return sample_weights(
            losses_B, valid_B, self.strategy, alpha=1.0, temperature=self.temperature, ends=ends,
            cap=self.options.cap, ess_floor=self.options.ess_floor,
        )  # fmt: skip


def main(argv: list[str]) -> int:
    """Weigh and draw; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.reweight_lab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--strategy", action="append", help=f"{', '.join(STRATEGIES)}, or module:function; repeatable")
    parser.add_argument("--temperature", type=float, action="append", help="r; repeatable (default 1.0 and 0.4)")
    parser.add_argument("--cap", type=float, default=0.0, help="no weight above cap / B (at least 1)")
    parser.add_argument("--ess-floor", type=float, default=0.0, help="least effective sample size, as a share of B")
    parser.add_argument("--quantile", type=float, default=0.0, help="ends of the loss scale; 0 is minimum and maximum")
    parser.add_argument("--replay", type=Path, action="append", default=[], help="run folder; repeatable")
    parser.add_argument("--out", type=Path, required=True, help="folder for lab.html and the tables")
    options = parser.parse_intermixed_args(argv)
    ways = _ways(options)
    replays = [row for run in options.replay for row in replay(run, ways)]
    options.out.mkdir(parents=True, exist_ok=True)
    descents = {way.label: descend(toy_quadratics(), way.weigh, _TOY_STEPS) for way in ways}
    _write_csv(options.out / "curves.csv", curves(ways))
    _write_csv(options.out / "toy.csv", toy_rows(descents))
    if replays:
        _write_csv(options.out / "replay.csv", replays)
        terminal().print(replay_table(replays))
    draw(ways, descents, replays, options.out / "lab.html")
    sys.stdout.write(
        f"no weight above 2/B for r >= {smallest_temperature_for_cap():.4f}; see {options.out / 'lab.html'}\n"
    )
    return 0


def curves(ways: Sequence[Way]) -> list[dict[str, Any]]:
    """B * w at evenly spread losses, a row for each loss and way."""
    losses_B = torch.linspace(1, 4, _SAMPLES, dtype=torch.float64)
    return [
        {"way": way.label, "loss": loss, "weight": weight}
        for way in ways
        for loss, weight in zip(losses_B.tolist(), (_SAMPLES * way.weigh(losses_B)).tolist(), strict=True)
    ]


def toy_rows(descents: dict[str, Descent]) -> list[dict[str, Any]]:
    """The toy's average loss, weighted loss, correction and bound for each way."""
    return [
        {
            "way": label,
            "average_loss": float(descent.average_T.mean()),
            "weighted_loss": float(descent.weighted_T.mean()),
            "correction": descent.correction,
            "bound": descent.bound,
        }
        for label, descent in descents.items()
    ]


def replay(run_dir: Path, ways: Sequence[Way]) -> list[dict[str, Any]]:
    """What each way makes of every recorded step of a run: a row for each, with what the run itself used beside it."""
    recorded = [row for row in iter_jsonl(run_dir / "metrics.jsonl") if "reweight/samples/loss" in row]
    if not recorded:
        raise ConfigError(f"{run_dir}: has no recorded losses; train with hooks.sample_reweight.record_every above 0")
    found = []
    for row in recorded:
        losses_B = torch.tensor(
            [math.nan if loss is None else loss for loss in row["reweight/samples/loss"]], dtype=torch.float64
        )
        valid_B = (torch.tensor(row["reweight/samples/tokens"]) > 0) & torch.isfinite(losses_B)
        num_valid = int(valid_B.sum())
        used_B = torch.tensor(row["reweight/samples/weight"], dtype=torch.float64) / num_valid
        for label, weights_B in [("as trained", used_B), *((way.label, way.weigh(losses_B, valid_B)) for way in ways)]:
            found.append(
                {
                    "run": run_dir.name,
                    "step": row["step"],
                    "way": label,
                    "ess": float(effective_sample_size(weights_B)) / num_valid,
                    "max_weight": float(weights_B.max()) * num_valid,
                    "weighted_loss": float((weights_B * torch.where(valid_B, losses_B, 0.0)).sum()),
                    "mean_loss": float(losses_B[valid_B].mean()),
                    "kl_from_trained": float(divergence(weights_B, used_B)),
                }
            )
    return found


def replay_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Means over the recorded steps, a line for each run and way."""
    table = Table(title="replayed over the recorded steps (means)")
    for column in ("run", "way", "ESS / B", "B max w", "weighted - mean loss", "KL from trained"):
        table.add_column(column)
    for run, way in dict.fromkeys((row["run"], row["way"]) for row in rows):
        own = [row for row in rows if (row["run"], row["way"]) == (run, way)]

        def mean(key: str, own: list[dict[str, Any]] = own) -> float:
            return math.fsum(row[key] for row in own) / len(own)

        table.add_row(
            run, way, f"{mean('ess'):.3f}", f"{mean('max_weight'):.3f}",
            f"{mean('weighted_loss') - mean('mean_loss'):+.4f}", f"{mean('kl_from_trained'):.4f}",
        )  # fmt: skip
    return table


def draw(ways: Sequence[Way], descents: dict[str, Descent], replays: Sequence[dict[str, Any]], path: Path) -> None:
    """All panels in one self-contained file."""
    from plotly.subplots import make_subplots

    titles = ["weight against loss", "effective sample size against temperature", "average loss on the toy"]
    titles += ["effective sample size, replayed"] if replays else []
    figure = make_subplots(rows=len(titles), cols=1, subplot_titles=titles, vertical_spacing=0.08)
    losses_B = torch.linspace(1, 4, _SAMPLES, dtype=torch.float64)
    for way in ways:
        figure.add_scatter(
            x=losses_B.tolist(), y=(_SAMPLES * way.weigh(losses_B)).tolist(), name=way.label, row=1, col=1
        )
    temperatures = torch.logspace(-1.3, 2, 60).tolist()
    for name, way in {way.name: way for way in ways}.items():
        sizes = [
            float(effective_sample_size(way._replace(temperature=r).weigh(losses_B))) / _SAMPLES for r in temperatures
        ]
        figure.add_scatter(x=temperatures, y=sizes, name=f"{name}, ESS / B", row=2, col=1)
    for label, descent in descents.items():
        figure.add_scatter(y=descent.average_T.tolist(), name=f"{label}, toy", row=3, col=1)
    figure.update_xaxes(type="log", row=2, col=1)
    figure.update_yaxes(type="log", row=3, col=1)
    for run, label in dict.fromkeys((row["run"], row["way"]) for row in replays):
        own = [row for row in replays if (row["run"], row["way"]) == (run, label)]
        figure.add_scatter(x=[r["step"] for r in own], y=[r["ess"] for r in own], name=f"{label}, {run}", row=4, col=1)
    figure.update_layout(height=420 * len(titles))
    figure.write_html(path, include_plotlyjs=True)


def _ways(options: argparse.Namespace) -> list[Way]:
    problems = []
    temperatures = options.temperature or [1.0, 0.4]
    problems += [
        f"--temperature: {r} must be finite and positive" for r in temperatures if not (math.isfinite(r) and r > 0)
    ]
    if options.cap and not (math.isfinite(options.cap) and options.cap >= 1):
        problems.append(f"--cap: {options.cap} must be at least 1, or 0 for no limit")
    if not 0 <= options.ess_floor < 1:
        problems.append(f"--ess-floor: {options.ess_floor} must be in [0, 1)")
    problems += [f"--{line}" for line in ReferenceConfig(kind="quantile", quantile=options.quantile).problems()]
    ways = []
    for name in options.strategy or ["uniform", "linupper", "quadratic", "extremes"]:
        try:
            # Uniform weights know no temperature.
            own = temperatures[:1] if name == "uniform" else temperatures
            ways += [Way(name, find_strategy(name), r, options) for r in own]
        except ConfigError as error:
            problems.append(f"--strategy: {error}")
    if problems:
        raise ConfigError(*problems)
    return ways


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(run_command(main))
