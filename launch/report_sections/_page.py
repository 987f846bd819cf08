"""From sections to one HTML file that needs nothing else: style, script, plotly and all numbers are inside."""

import html
import json
import re
from collections.abc import Sequence
from importlib.resources import files

import numpy as np

from launch.report_sections._parts import Chart, Section, Table, Tile, digits
from launch.report_sections._record import RunRecord

_AXIS_POINTS = 2000
_NUMBER = re.compile(r"[-+<]?[\d.,]+|–")
_THEME = "document.documentElement.dataset.theme=matchMedia('(prefers-color-scheme: dark)').matches?'dark':'light'"
_FOOT = (
    "A line of more than 1,000 points is drawn as means over stretches of equal length; where a band is shown it "
    "reaches from the least to the largest value of each stretch. Sliders and tables show an even selection, first "
    "and last always among it. Drag in a chart to zoom, double-click to go back."
)


def html_page(
    name: str, lead: str, sections: Sequence[Section], *, runs: Sequence[RunRecord] = (), otherwise: str = ""
) -> str:
    """A page of sections under a name and a line of text; `otherwise` stands where there is none.

    `runs`: what traces mean by the number of their run.
    """
    from plotly.offline import get_plotlyjs  # slow to import, and no step needs it

    figures: list[Chart] = []
    anchors = [_anchor(section.title) for section in sections]
    body = "".join(
        _section(anchor, section, figures) for anchor, section in zip(anchors, sections, strict=True)
    )  # fills figures
    links = "".join(
        f'<a href="#{anchor}">{html.escape(section.title)}</a>'
        for anchor, section in zip(anchors, sections, strict=True)
    )
    data = {
        "name": name,
        "axis": "tokens",
        "runs": [_axes(run) for run in runs],
        "figures": [_plain(f) for f in figures],
    }
    title, lead = html.escape(name), html.escape(lead)
    axes = "".join(f'<button data-axis="{axis}">{axis}</button>' for axis in ("step", "tokens", "hours"))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>\n{_asset('page.css')}</style><script>{_THEME}</script></head>\n<body>"
        f'<header class="bar"><div><nav aria-label="Sections">{links}</nav>'
        f'<span class="axes" role="group" aria-label="Horizontal axis"{"" if runs else " hidden"}>{axes}</span>'
        '<button id="theme" aria-label="Light or dark" title="Light or dark">◐</button></div></header>\n'
        f'<main><h1>{title}</h1><p class="lead">{lead}</p>'
        f"{body or f'<p>{html.escape(otherwise)}</p>'}<footer>{_FOOT}</footer></main>\n"
        f'<script type="application/json" id="page-data">{_json(data)}</script>\n'
        f"<script>{get_plotlyjs()}</script>\n<script>{_asset('page.js')}</script></body></html>\n"
    )


def _section(anchor: str, section: Section, figures: list[Chart]) -> str:
    parts: list[str] = []
    cards: list[str] = []

    def close() -> None:
        if cards:
            parts.append(f'<div class="cards">{"".join(cards)}</div>')
            cards.clear()

    for item in section.items:
        if isinstance(item, Chart):
            cards.append(_card(len(figures), item))
            figures.append(item)
        elif isinstance(item, Table):
            cards.append(_table(item))
        else:
            close()
            parts.append(f'<div class="tiles" style="--tiles: {len(item)}">{"".join(map(_tile, item))}</div>')
    close()
    title, intro = html.escape(section.title), html.escape(section.intro)
    head = f'<h2><a href="#{anchor}">{title}</a></h2><p class="intro">{intro}</p>'
    return f'\n<section id="{anchor}">{head if section.intro else ""}{"".join(parts)}</section>'


def _card(number: int, chart: Chart) -> str:
    menus = max((len(view.labels) for view in chart.views), default=0)
    selects = "".join("<select></select>" for _ in range(menus)) if len(chart.views) > 1 else ""
    slider = any(view.frames for view in chart.views)
    return (
        f'\n<figure class="card{" wide" if chart.wide else ""}" data-figure="{number}"><div class="head"><figcaption>'
        f"<h3>{html.escape(chart.title)}</h3></figcaption>"
        '<div class="tools"><button data-save="png">PNG</button><button data-save="svg">SVG</button>'
        f'<button data-save="csv">CSV</button></div></div><p class="note">{html.escape(chart.note)}</p>'
        + (f'<div class="menus">{selects}</div>' if selects else "")
        + '<div class="plot"></div><div class="legend"></div>'
        + (
            f'<label class="slide"><output></output><input type="range" min="0" step="1" '
            f'aria-label="{html.escape(chart.slider)}"></label>'
            if slider
            else ""
        )
        + "</figure>"
    )


def _table(table: Table) -> str:
    numeric = [
        any(row[i] for row in table.rows) and all(not row[i] or _NUMBER.match(row[i]) for row in table.rows)
        for i in range(len(table.columns))
    ]
    long = [any(len(row[i]) > 60 for row in table.rows) for i in range(len(table.columns))]
    kinds = ["long" if wide else "num" if number else "" for wide, number in zip(long, numeric, strict=True)]

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{f' class={kind}' if kind else ''}>{html.escape(value)}</{tag}>"
            for kind, value in zip(kinds, values, strict=True)
        )

    rows = "".join(
        f"<tr{' class=strong' if i in table.emphasis else ''}>{cells('td', row)}</tr>"
        for i, row in enumerate(table.rows)
    )
    title, note = html.escape(table.title), html.escape(table.note)
    head = f"<thead><tr>{cells('th', table.columns)}</tr></thead>"
    grid = f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>'
    note = f'<p class="note">{note}</p>' if note else ""
    if table.folded:
        return f'\n<div class="card wide"><details><summary>{title}</summary>{note}{grid}</details></div>'
    return f'\n<div class="card wide"><h3>{title}</h3>{note}{grid}</div>'


def _tile(tile: Tile) -> str:
    return (
        f'<div class="tile"><div class="label">{html.escape(tile.label)}</div>'
        f'<div class="value">{html.escape(tile.value)}</div><div class="small">{html.escape(tile.note)}</div>'
        f"{_spark(tile.spark)}</div>"
    )


def _spark(values: Sequence[float]) -> str:
    """A line without axes."""
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    points = " ".join(
        f"{100 * i / (len(values) - 1):.1f},{24 - 22 * (value - low) / ((high - low) or 1):.1f}"
        for i, value in enumerate(values)
    )
    return (
        '<svg viewBox="0 0 100 26" preserveAspectRatio="none" aria-hidden="true"><polyline fill="none" '
        f'stroke="currentColor" stroke-width="1.5" vector-effect="non-scaling-stroke" points="{points}"/></svg>'
    )


def _axes(run: RunRecord) -> dict[str, list[float | None]]:
    """Steps, and tokens and hours if they are known, of a run at as many points as its lines need."""
    count = run.steps.count
    keep = (
        np.unique(np.linspace(0, count - 1, min(count, _AXIS_POINTS)).round().astype(int))
        if count
        else np.zeros(0, int)
    )
    columns = {"step": run.steps["step"], "tokens": run.steps["tokens"], "hours": run.hours}
    known = {name: values for name, values in columns.items() if np.isfinite(values).all() and values[-1:].any()}
    return {name: [0.0, *digits(values[keep], 8)] for name, values in known.items()}


def _plain(chart: Chart) -> dict[str, object]:
    views = [
        {
            "labels": view.labels, "layout": view.layout, "traces": view.traces,
            "frames": [frame._asdict() for frame in view.frames],
        }
        for view in chart.views
    ]  # fmt: skip
    named = {name: getattr(chart, name) for name in ("title", "layout", "direct", "height", "slider")}
    return named | {"views": views}


def _json(data: object) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _asset(name: str) -> str:
    return (files("launch.report_sections") / name).read_text()
