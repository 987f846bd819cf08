"""The headline: a row of figures of one run, or a table with a line for each of several."""

import math
from collections.abc import Sequence

import numpy as np

from launch.report_sections._parts import Section, Table, Tile, evenly, number, si
from launch.report_sections._record import Columns, RunRecord

_SPARK = 60


def overview(runs: Sequence[RunRecord]) -> Section:
    """Always there."""
    if len(runs) == 1:
        return Section("Overview", "", [tiles(runs[0])])
    return Section(
        "Runs",
        "MaxVio over held-out text; time in training steps. The lowest held-out loss is in bold.",
        [_table(runs)],
    )


def lead(runs: Sequence[RunRecord]) -> str:
    """One line under the name."""
    if len(runs) > 1:
        return f"{len(runs)} runs: {_count(runs)}."
    run = runs[0]
    of = f" of {run.planned_steps:,}" if run.planned_steps else ""
    words = [f"{run.status.capitalize()}: step {run.last_step:,}{of}"]
    if run.steps.count:
        words.append(f"{_duration(float(run.hours[-1]))} in steps")
    model = run.config
    if model.get("model.num_experts"):
        words.append(
            f"{model['model.num_layers']} layers, {model['model.num_experts']} experts, top {model['model.top_k']}"
        )
    rule, strategy = model.get("hooks.expert_bias.rule"), model.get("hooks.sample_reweight.strategy")
    words += [f"bias rule {rule}"] if rule else []
    words += [f"weights {strategy}"] if strategy else []
    return "; ".join(words) + "."


def tiles(run: RunRecord) -> list[Tile]:
    """The figures that matter, as far as the run recorded them."""
    steps, evals, found = run.steps, run.evals, []
    losses = evals.line("eval/loss")[1]
    if len(losses):
        found.append(_tile("held-out loss", evals, "eval/loss", ".3f"))
        found.append(_tile("perplexity", evals, "eval/ppl", ",.1f"))
    elif steps.count:
        found.append(_tile("training loss", steps, "loss", ".3f"))
    if "eval/maxvio_global" in evals:
        found.append(_tile("MaxVio, held-out", evals, "eval/maxvio_global", ".3f"))
    elif "moe/maxvio_batch" in steps:
        found.append(_tile("MaxVio of a batch", steps, "moe/maxvio_batch", ".3f"))
    if "reweight/ess" in steps:
        values = steps.line("reweight/ess")[1]
        found.append(Tile("mean ESS / B", number(float(values.mean())), f"least {values.min():.3f}", _spark(values)))
    if steps.count:
        speed = steps.line("tokens_per_s")[1]
        if len(speed):
            rate = float(np.median(speed))
            mfu = steps.line("mfu")[1]
            note = f"MFU {np.median(mfu):.1%}" if len(mfu) else "median"
            found.append(Tile("tokens / s", si(rate), note, _spark(speed)))
        found.append(Tile("tokens trained", si(steps.last("tokens")), f"{run.last_step:,} steps"))
        if "memory/gib" in steps:
            found.append(Tile("peak memory", f"{steps.line('memory/gib')[1].max():.3g} GiB", "a rank"))
        skipped = int((steps["step/applied"] == 0).sum())
        restarts = sum(event.kind == "resume" for event in run.log)
        found.append(Tile("skipped steps", f"{skipped:,}", f"{restarts} restart{'' if restarts == 1 else 's'}"))
    return found


def _tile(label: str, columns: Columns, key: str, form: str) -> Tile:
    values = columns.line(key)[1]
    first = f"from {values[0]:{form}}" if len(values) > 1 else ""
    return Tile(label, number(columns.last(key), form), first, _spark(values))


def _spark(values: np.ndarray) -> list[float]:
    if len(values) > _SPARK:
        values = np.array([piece.mean() for piece in np.array_split(values, _SPARK)])
    return [round(float(value), 6) for value in evenly(list(values), _SPARK)]


def _table(runs: Sequence[RunRecord]) -> Table:
    rows = []
    for run in runs:
        ess = run.steps.line("reweight/ess")[1]
        speed = run.steps.line("tokens_per_s")[1]
        rows.append(
            [
                run.name, run.status, f"{run.last_step:,}", si(run.steps.last("tokens")),
                number(run.evals.last("eval/loss"), ".4f"), number(run.evals.last("eval/ppl"), ",.1f"),
                number(run.evals.last("eval/maxvio_global")), number(float(ess.mean()) if len(ess) else None),
                si(float(np.median(speed)) if len(speed) else None),
                _duration(float(run.hours[-1])) if run.steps.count else "–",
                f"{int((run.steps['step/applied'] == 0).sum())}",
            ]
        )  # fmt: skip
    losses = [run.evals.last("eval/loss") for run in runs]
    known = [loss for loss in losses if loss is not None]
    best = frozenset(i for i, loss in enumerate(losses) if known and loss == min(known))
    columns = ["run", "status", "step", "tokens", "held-out loss", "perplexity", "MaxVio", "mean ESS",
               "tokens / s", "time", "skipped"]  # fmt: skip
    return Table(f"{len(runs)} runs", "", columns, rows, emphasis=best, folded=len(runs) > 8)


def _count(runs: Sequence[RunRecord]) -> str:
    words = [run.status for run in runs]
    return ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))


def _duration(hours: float) -> str:
    if not math.isfinite(hours):
        return "–"
    seconds = hours * 3600
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{hours:.1f} h"
