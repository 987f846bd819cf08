"""`launch.data audit`: counts as a table and as CSV files, and what deviates from the plan."""

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch._stream import Stream
from trainer.data.audit import Audit, document_visits
from trainer.errors import ConfigError, StorageError
from trainer.metrics import iter_jsonl

_SHOWN = 20


def audit(stream: Stream, console: Console, *, samples: int | None, out: Path | None) -> int:
    """Count, print, write; returns 3 if something is not as planned, else 0."""
    corpus, size = stream.corpus, stream.config.train.global_batch_size
    stop = samples or stream.trained or stream.planned
    counted = Audit.of(corpus.plan, stop, global_batch_size=size)
    recorded = _recorded(stream, min(stop, stream.trained) // size)
    deviations = counted.deviations() + counted.recorded_deviations(recorded)
    documents = [
        document_visits(corpus.document_starts(domain), corpus.pieces(domain), visits_R)
        for domain, visits_R in enumerate(counted.visits)
    ]
    seen = "trained" if stop <= stream.trained else "planned"
    console.print(_phases(counted, corpus.domain_names, f"{stream.name}: {stop:,} samples {seen}"))
    table = Table(title="visits")
    for title in ("domain", "rows", "epochs", "visits of a row", "documents", "visits of a document"):
        table.add_column(title, justify="left" if title == "domain" else "right")
    for name, visits_R, found in zip(corpus.domain_names, counted.visits, documents, strict=True):
        rows, total = len(visits_R), int(visits_R.sum())
        epochs = f"{total / rows:.3f}" if rows else "-"
        table.add_row(
            name, f"{rows:,}", epochs, _span(visits_R), f"{len(found.tokens_N):,}",
            _span(found.least_N, found.most_N),
        )  # fmt: skip
    console.print(table)

    folder = out or (None if stream.run_dir is None else stream.run_dir / "audit")
    if folder is not None:
        _write_all(folder, counted, documents, corpus.domain_names)
        console.print(f"documents.csv, rows.csv and phases.csv are in {folder}", highlight=False)
    checked = sum(step <= len(counted.digests) for step in recorded)
    if stream.run_dir is not None:
        console.print(f"{checked:,} of {min(stop, stream.trained) // size:,} trained steps recorded their samples")
    for line in deviations[:_SHOWN]:
        console.print(f"deviation: {line}", style="red", highlight=False)
    if len(deviations) > _SHOWN:
        console.print(f"and {len(deviations) - _SHOWN:,} more")
    console.print("exactly as planned" if not deviations else f"{len(deviations):,} deviations from the plan")
    return 3 if deviations else 0


def _recorded(stream: Stream, last_step: int) -> dict[int, list[int]]:
    """Digests of a run's steps, by step, up to the checkpoint: later steps are trained again when the run goes on."""
    if stream.run_dir is None or not last_step:
        return {}
    found: dict[int, list[int]] = {}
    try:
        for row in iter_jsonl(stream.run_dir / "metrics.jsonl"):
            if row.get("data/digest") is not None and row["step"] <= last_step:
                found.setdefault(row["step"], []).append(row["data/digest"])
    except ConfigError:
        return {}
    return found


def _phases(counted: Audit, names: Sequence[str], title: str) -> Table:
    table = Table(title=title)
    for column in ("phase", "from sample", "samples", "domain", "planned", "counted"):
        table.add_column(column, justify="left" if column == "domain" else "right")
    last = None
    for each in counted.phases:
        if each.counted or each.planned:
            new = each.phase.number != last
            last = each.phase.number
            head = (str(last), f"{each.phase.start:,}", f"{each.samples:,}") if new else ("", "", "")
            if new and table.row_count:
                table.add_section()
            table.add_row(*head, names[each.domain], f"{each.planned:,.1f}", f"{each.counted:,}")
    table.caption = "\n".join(
        f"phase {number}: {cause}"
        for number, cause in list({e.phase.number: e.phase.cause for e in counted.phases}.items())[:_SHOWN]
    )
    return table


def _span(least: Any, most: Any = None) -> str:
    if not len(least):
        return "-"
    low, high = int(least.min()), int((least if most is None else most).max())
    return str(low) if low == high else f"{low} to {high}"


def _write_all(folder: Path, counted: Audit, documents: Sequence[Any], names: Sequence[str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(
            folder / "phases.csv",
            ("phase", "first_sample", "samples", "cause", "domain", "planned", "counted"),
            (
                (e.phase.number, e.phase.start, e.samples, e.phase.cause, names[e.domain], e.planned, e.counted)
                for e in counted.phases
            ),
        )
        _write(
            folder / "rows.csv",
            ("domain", "row", "visits"),
            (
                (name, row, visits)
                for name, visits_R in zip(names, counted.visits, strict=True)
                for row, visits in enumerate(visits_R.tolist())
            ),
        )
        _write(
            folder / "documents.csv",
            ("domain", "document", "tokens", "least_visits", "most_visits"),
            (
                (name, number, *values)
                for name, found in zip(names, documents, strict=True)
                for number, values in enumerate(
                    zip(found.tokens_N.tolist(), found.least_N.tolist(), found.most_N.tolist(), strict=True)
                )
            ),
        )
    except OSError as error:
        where = error.filename or folder
        raise StorageError(f"{where}: {error.strerror}; free space or choose another --out") from error


def _write(path: Path, header: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    staging = path.with_suffix(".tmp")
    with staging.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(lines)
    os.replace(staging, path)
