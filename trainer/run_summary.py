"""What a finished run came to, from its rows of metrics."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table

from trainer.metrics import Row


@dataclass(frozen=True)
class RunSummary:
    """Held-out perplexities before and after, and the two figures the hooks are for."""

    ppl: dict[str, tuple[float, float]]
    """(first, last) held-out perplexity by domain, `all` last."""
    maxvio_global: tuple[float, float] | None
    """(first, last); None for a run without the bias hook."""
    mean_ess: float | None
    """Mean effective sample size / B over the steps; None for a run without weights."""

    def loss_change(self, domain: str) -> float:
        """Relative change of a domain's held-out loss: -0.3 is 30 % less."""
        first, last = (math.log(ppl) for ppl in self.ppl[domain])
        return last / first - 1


def summarize(rows: Iterable[Row], domain_names: Sequence[str]) -> RunSummary | None:
    """Summary of a run's rows, in one pass; None if it has not been evaluated."""
    first: Row | None = None
    last: Row = {}
    ess_sum, num_ess = 0.0, 0
    for row in rows:
        if "eval/loss" in row:
            first, last = first or row, row
        if row.get("reweight/ess") is not None:
            ess_sum, num_ess = ess_sum + row["reweight/ess"], num_ess + 1
    if first is None:
        return None
    keys = {name: f"eval/{name}/ppl" for name in domain_names} | {"all": "eval/ppl"}
    ppl = {
        name: (first[key], last[key])
        for name, key in keys.items()
        if first.get(key) is not None and last.get(key) is not None
    }
    violations = (first.get("eval/maxvio_global"), last.get("eval/maxvio_global"))
    return RunSummary(
        ppl,
        None if None in violations else violations,  # type: ignore[arg-type]  # both are numbers here
        ess_sum / num_ess if num_ess else None,
    )


def summary_table(summary: RunSummary) -> Table:
    """The summary as a table for the terminal."""
    table = Table(title="held-out perplexity")
    table.add_column("domain")
    for title in ("before", "after", "loss"):
        table.add_column(title, justify="right")
    for name, (before, after) in summary.ppl.items():
        if name == "all":
            table.add_section()
        table.add_row(name, f"{before:,.1f}", f"{after:,.1f}", f"{summary.loss_change(name):+.1%}")
    if summary.maxvio_global is not None or summary.mean_ess is not None:
        table.add_section()
    if summary.maxvio_global is not None:
        before, after = summary.maxvio_global
        table.add_row("MaxVio_global", f"{before:.3f}", f"{after:.3f}", "")
    if summary.mean_ess is not None:
        table.add_row("mean ESS / B", "", f"{summary.mean_ess:.3f}", "")
    return table
