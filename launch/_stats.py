"""`launch.data stats`: what a corpus holds and what a run makes of it, as a table and as one HTML page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table as TerminalTable

from launch._stream import Stream
from launch.report_sections._parts import MAX_POINTS, Chart, Section, Table, View, axis, color_of, digits
from trainer.data.order import Integers
from trainer.data.prepare import read_manifest

_BINS = 40
_HELD = ("docs", "median", "90 %", "longest", "tokens", "held out", "B/token")
_MADE = ("rows", "padding", "of samples", "epochs")


class DomainStats(NamedTuple):
    """One domain."""

    name: str
    lengths_N: Integers
    """Tokens of each training document, its end mark included."""
    heldout_tokens: int
    bytes_per_token: float
    rows: int
    padding: float
    """Share of the places of its rows that hold no token."""
    share: float
    """Share of the run's samples."""
    samples: int
    """Samples of the run."""

    @property
    def epochs(self) -> float:
        return self.samples / self.rows if self.rows else 0.0


def stats(stream: Stream, console: Console, out: Path | None) -> None:
    """Print the table; write the page if `out` is given."""
    samples = stream.planned if stream.corpus.plan.end is None else min(stream.planned, stream.corpus.plan.end)
    visits = stream.corpus.plan.visits(samples)
    manifest: Any = read_manifest(Path(stream.config.data.path))  # it was there when the corpus was opened
    found = [_domain(stream, manifest, domain, samples, visits[domain]) for domain in range(len(visits))]
    names = [each.name for each in found]
    batch = f"{stream.config.train.steps:,} steps of {stream.config.train.global_batch_size:,}"
    made = f"{stream.name}: rows of {stream.config.train.sequence_length:,}, {batch}"
    console.print(_table("training text: documents and their lengths in tokens", _HELD, names, [*map(_held, found)]))
    console.print(_table(made, _MADE, names, [*map(_made, found)]))
    lead = _lead(stream, manifest, found)
    console.print(lead, highlight=False)
    if out is not None:
        from launch.report import html_page, write_page  # slow, and the table needs none of it

        page = html_page(f"Data of {stream.name}", lead, _sections(stream, found, samples))
        console.print(str(write_page(out, page)), highlight=False)


def _domain(stream: Stream, manifest: Any, domain: int, samples: int, visits: int) -> DomainStats:
    corpus, length = stream.corpus, stream.config.train.sequence_length
    name = corpus.domain_names[domain]
    lengths_N = np.diff(corpus.document_starts(domain))
    pieces = corpus.pieces(domain)
    rows = corpus.plan.rows_D[domain]
    filled = int((pieces.stops_P - pieces.starts_P).sum())
    counts = manifest["domains"][name]
    tokens = sum(counts[split]["tokens"] for split in ("train", "heldout"))
    return DomainStats(
        name=name,
        lengths_N=lengths_N,
        heldout_tokens=counts["heldout"]["tokens"],
        bytes_per_token=counts["bytes"] / tokens if tokens else 0.0,
        rows=rows,
        padding=1 - filled / (rows * length) if rows else 0.0,
        share=visits / samples,
        samples=visits,
    )


def _table(title: str, columns: Sequence[str], names: Sequence[str], cells: Sequence[Sequence[str]]) -> TerminalTable:
    table = TerminalTable(title=title)
    table.add_column("domain")
    for column in columns:
        table.add_column(column, justify="right")
    for name, values in zip(names, cells, strict=True):
        table.add_row(name, *values)
    return table


def _held(each: DomainStats) -> tuple[str, ...]:
    lengths = each.lengths_N if len(each.lengths_N) else np.zeros(1, dtype=np.int64)
    return (
        f"{len(each.lengths_N):,}", f"{np.median(lengths):,.0f}", f"{np.quantile(lengths, 0.9):,.0f}",
        f"{lengths.max():,}", f"{each.lengths_N.sum():,}", f"{each.heldout_tokens:,}", f"{each.bytes_per_token:.2f}",
    )  # fmt: skip


def _made(each: DomainStats) -> tuple[str, ...]:
    return f"{each.rows:,}", f"{each.padding:.2%}", f"{each.share:.1%}", f"{each.epochs:.3f}"


def _lead(stream: Stream, manifest: Any, found: Sequence[DomainStats]) -> str:
    tokens = sum(int(each.lengths_N.sum()) for each in found)
    rows = sum(each.rows for each in found)
    padded = sum(each.padding * each.rows for each in found) / rows
    dropped = manifest.get("duplicates_dropped", 0)
    return (
        f"{tokens:,} training tokens in {rows:,} rows ({stream.config.data.packing}), {padded:.2%} padding; "
        f"{dropped:,} duplicate documents were dropped when the text was prepared."
    )


def _sections(stream: Stream, found: Sequence[DomainStats], samples: int) -> list[Section]:
    table = Table(
        "Domains", "Training text, and what the run makes of it.", ["domain", *_HELD, *_MADE],
        [[each.name, *_held(each), *_made(each)] for each in found],
    )  # fmt: skip
    tokens = _bars(
        "Tokens", "By domain and split.", "tokens", found,
        train=[int(each.lengths_N.sum()) for each in found], heldout=[each.heldout_tokens for each in found],
    )  # fmt: skip
    compression = _bars(
        "Compression", "Bytes of text a token stands for.", "bytes", found, bytes=[e.bytes_per_token for e in found]
    )
    epochs = _bars(
        "Epochs", "Passes over a domain's rows in the whole run.", "epochs", found, epochs=[e.epochs for e in found]
    )
    padding = _bars(
        "Padding", "Share of the places of rows without a token.", "share", found, padding=[e.padding for e in found]
    )
    return [
        Section("What the corpus holds", "Counted from its shards and manifest.",
                [table, tokens, compression, _lengths(stream, found)]),
        Section("What the run makes of it", "Counted from the plan of its samples.",
                [_mixture(stream, samples), epochs, padding]),
    ]  # fmt: skip


def _bars(title: str, note: str, unit: str, found: Sequence[DomainStats], **series: Sequence[float]) -> Chart:
    traces = [
        {"type": "bar", "name": name, "x": [each.name for each in found], "y": digits(values),
         "marker": {"color": color_of(i)}}
        for i, (name, values) in enumerate(series.items())
    ]  # fmt: skip
    return Chart(
        title, note, [View(traces)], {"yaxis": axis(unit, rangemode="tozero"), "xaxis": axis(""), "barmode": "group"}
    )


def _lengths(stream: Stream, found: Sequence[DomainStats]) -> Chart:
    edges = _edges([each.lengths_N for each in found])
    middles = np.sqrt(edges[1:] * edges[:-1]).round(1).tolist()
    traces = [
        {"type": "scatter", "mode": "lines", "name": each.name, "x": middles,
         "y": digits((np.histogram(each.lengths_N, edges)[0] / max(len(each.lengths_N), 1)).tolist()),
         "line": {"color": color_of(i), "shape": "hvh", "width": 1.6}}
        for i, each in enumerate(found)
    ]  # fmt: skip
    row = stream.config.train.sequence_length
    mark = {"type": "line", "x0": row, "x1": row, "yref": "paper", "y0": 0, "y1": 1,
            "line": {"color": "--muted", "dash": "dot", "width": 1}}  # fmt: skip
    layout = {"xaxis": axis("tokens", type="log", dtick=1), "yaxis": axis("share of the documents"), "shapes": [mark]}
    note = f"Share of a domain's training documents in each range of lengths; dotted: one row of {row:,} tokens."
    return Chart("Lengths of documents", note, [View(traces)], layout, wide=True)


def _mixture(stream: Stream, samples: int) -> Chart:
    phases = stream.corpus.plan.phases(samples)
    phases = phases[:: -(-len(phases) // MAX_POINTS) or 1]
    size = stream.config.train.global_batch_size
    x = [*(phase.start / size for phase in phases), samples / size]
    traces = [
        {"type": "scatter", "mode": "lines", "name": name, "x": x, "stackgroup": "all",
         "fillcolor": f"{color_of(d)}/0.55",
         "y": digits([*(float(phase.shares_D[d]) for phase in phases), float(phases[-1].shares_D[d])]),
         "line": {"shape": "hv", "width": 0.5, "color": color_of(d)}}
        for d, name in enumerate(stream.corpus.domain_names)
    ]  # fmt: skip
    causes = "; ".join(f"step {phase.start / size:g}: {phase.cause}" for phase in phases[:8])
    layout = {"xaxis": axis("optimizer step"), "yaxis": axis("share of samples", range=[0, 1])}
    return Chart("Mixture", f"Phases begin at {causes}.", [View(traces)], layout, wide=True)


def _edges(lengths: Sequence[Integers]) -> NDArray[np.float64]:
    most = max((int(each.max()) for each in lengths if len(each)), default=1)
    return np.unique(np.geomspace(1, most + 1, _BINS).round(2))
