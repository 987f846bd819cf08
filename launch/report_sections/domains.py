"""The section on domains and data: perplexity of each, tokens trained, shares of the objective, and the corpus."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launch.report_sections._parts import (
    Chart,
    Section,
    Table,
    Trace,
    View,
    axis,
    color_of,
    digits,
    log_axis,
    means,
    menu,
    number,
    si,
)  # fmt: skip
from launch.report_sections._record import RunRecord
from launch.report_sections._runs import over_runs
from trainer.data.prepare import read_manifest
from trainer.errors import EvenkeelError


def domains(runs: Sequence[RunRecord]) -> Section | None:
    """Domains of the runs; None where none was recorded."""
    items: list[Chart | Table] = []
    if any(run.heldout_domains for run in runs):
        items.append(_perplexities(runs))
        if len(runs) > 1:
            items.append(_by_domain(runs))
    if any(run.domain_names and run.steps.count for run in runs):
        items.append(_trained(runs))
        items.append(_shares(runs))
    if not items:
        return None
    return Section("Domains", "What the text is made of, and how the model does on each part of it.", items)


def _perplexities(runs: Sequence[RunRecord]) -> Table:
    names = list(dict.fromkeys(name for run in runs for name in run.heldout_domains))
    if len(runs) == 1:
        columns = runs[0].evals
        rows = []
        for name, key in [*((name, f"eval/{name}/ppl") for name in names), ("all", "eval/ppl")]:
            first, last = columns.first(key), columns.last(key)
            change = (
                None if first is None or last is None or min(first, last) <= 1 else np.log(last) / np.log(first) - 1
            )
            best = columns.line(key)[1]
            rows.append([name, number(first, ",.1f"), number(last, ",.1f"),
                         number(float(best.min()) if len(best) else None, ",.1f"),
                         number(change, "+.1%")])  # fmt: skip
        return Table("Held-out perplexity", "Loss: relative change of the mean loss a token.",
                     ["domain", "first", "last", "best", "loss"], rows, emphasis=frozenset({len(names)}))  # fmt: skip
    rows = [
        [run.name, *(number(run.evals.last(key), ",.1f") for key in [f"eval/{n}/ppl" for n in names] + ["eval/ppl"])]
        for run in runs
    ]
    return Table("Held-out perplexity, last evaluation", "", ["run", *names, "all"], rows, folded=len(runs) > 8)


def _by_domain(runs: Sequence[RunRecord]) -> Chart:
    names = list(dict.fromkeys(name for run in runs for name in run.heldout_domains))
    views = []
    for name in names:
        traces = over_runs(runs, f"eval/{name}/ppl", evaluations=True)
        views.append(View(traces, (name,)))
    return Chart("Held-out perplexity of a domain", "Choose the domain in the menu.", views,
                 {"yaxis": log_axis("perplexity", [trace for view in views for trace in view.traces])}, wide=True,
                 direct=True)  # fmt: skip


def _trained(runs: Sequence[RunRecord]) -> Table:
    """Tokens of each domain, against what the corpus has, where it is on this machine."""
    rows = []
    for run in runs:
        corpus = _corpus(run)
        total = sum(_tokens(run, name) for name in run.domain_names) or 1.0
        for name in run.domain_names:
            seen, held = _tokens(run, name), corpus.get(name, {})
            in_corpus = held.get("train", {}).get("tokens")
            every = in_corpus and held["train"]["tokens"] + held["heldout"]["tokens"]
            weights = run.steps[f"domain/{name}/weight"]
            rows.append(
                [
                    *([run.name] if len(runs) > 1 else []), name, si(seen), number(seen / total, ".1%"),
                    number(float(np.nanmean(weights)) if np.isfinite(weights).any() else None, ".1%"),
                    number(run.evals.last(f"eval/{name}/ppl"), ",.1f"),
                    si(in_corpus), number(seen / in_corpus if in_corpus else None, ".3f"),
                    f"{held['train']['documents']:,}" if in_corpus else "–",
                    number(held["bytes"] / every if every else None, ".2f"),
                ]
            )  # fmt: skip
    columns = ["domain", "tokens trained", "of tokens", "of objective", "perplexity", "tokens in corpus", "epochs",
               "documents", "bytes / token"]  # fmt: skip
    return Table(
        "Text trained on",
        "A domain whose share of the objective lies above its share of tokens is one that the weights favour. The "
        "columns from the corpus on need the prepared data on the machine that makes the report.",
        [*(["run"] if len(runs) > 1 else []), *columns], rows, folded=len(runs) > 2,
    )  # fmt: skip


def _tokens(run: RunRecord, name: str) -> float:
    return float(np.nansum(run.steps[f"domain/{name}/tokens"]))


def _corpus(run: RunRecord) -> dict[str, Any]:
    path = run.config.get("data.path")
    try:
        manifest = read_manifest(Path(path)) if isinstance(path, str) else None
    except (EvenkeelError, OSError):
        return {}
    return {} if manifest is None else manifest["domains"]


_KINDS = (
    ("loss", "loss"),
    ("share of tokens", "tokens"),
    ("share of objective", "weight"),
    ("weight set (alpha)", "alpha"),
)
_STRETCHES = 60


def _shares(runs: Sequence[RunRecord]) -> Chart:
    views = []
    for i, run in enumerate(runs):
        for label, kind in _KINDS:
            traces = [trace for d, name in enumerate(run.domain_names) for trace in _course(run, i, d, name, kind)]
            if traces:
                views.append(View(traces, menu(runs, i, label)))
    return Chart(
        "Domains over time", "Training text, averaged over stretches of the run. Choose in the menu what is drawn.",
        views, {"yaxis": axis("")}, wide=True, direct=True,
    )  # fmt: skip


def _course(run: RunRecord, run_number: int, domain: int, name: str, kind: str) -> list[Trace]:
    steps, values = means(run.steps, f"domain/{name}/{kind}", _STRETCHES)
    if kind == "tokens" and len(values):
        total = sum(means(run.steps, f"domain/{each}/tokens", _STRETCHES)[1] for each in run.domain_names)
        values = values / np.maximum(total, 1e-9)
    if not len(steps):
        return []
    return [
        {"type": "scatter", "mode": "lines", "name": name, "run": run_number, "x": digits(steps, 8),
         "y": digits(values),
         "line": {"color": color_of(domain), "width": 1.6}}
    ]  # fmt: skip
