"""Draw runs: `python -m launch.report runs/quickstart [runs/other ...]` writes report.html into each run folder.

One file with everything in it: it needs no network and may be moved or mailed. `launch.train` writes it too, when a run
ends. What it shows comes from metrics.jsonl alone; each section lives in a file of its own in launch/report_sections.
"""

import argparse
import html
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launch._cli import run_command
from launch.report_sections._parts import Chart, RunRecord, Section, SectionOf
from launch.report_sections.balance import balance
from launch.report_sections.reweighting import reweighting
from trainer.errors import StorageError

SECTIONS: Sequence[SectionOf] = (balance, reweighting)
"""In the order of the page. A section that has nothing to show is left out."""

FILE = "report.html"

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h2 { border-bottom: 1px solid #ccc; margin-top: 3rem; } h3 { margin: 2rem 0 0; } p { max-width: 48rem; }
nav a { margin-right: 1rem; }
"""


def main(argv: list[str]) -> int:
    """Write the reports; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    for run_dir in parser.parse_intermixed_args(argv).runs:
        sys.stdout.write(f"{write_report(run_dir)}\n")
    return 0


def write_report(run_dir: Path) -> Path:
    """Write the report of one run and return its path.

    Raises ConfigError if the folder has no metrics, StorageError if the disk refuses.
    """
    run = RunRecord.read(run_dir)
    sections = [section for draw in SECTIONS if (section := draw(run)) is not None]
    path, staging = run_dir / FILE, run_dir / f".{FILE}.tmp"
    try:
        staging.write_text(page(run, sections))
        os.replace(staging, path)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}; free space or make it writable") from error
    return path


def page(run: RunRecord, sections: Sequence[Section]) -> str:
    """The whole page, plotly's script included."""
    return html_page(
        run.name,
        f"As of step {run.rows[-1]['step']}.",
        sections,
        otherwise="This run has recorded nothing that a section shows.",
    )


def html_page(name: str, lead: str, sections: Sequence[Section], *, otherwise: str = "") -> str:
    """A page of sections under a name and a line of text; `otherwise` stands where there is none."""
    from plotly.offline import get_plotlyjs

    title = html.escape(name)
    links = "".join(f'<a href="#s{i}">{html.escape(section.title)}</a>' for i, section in enumerate(sections))
    body = "".join(_section(i, section) for i, section in enumerate(sections))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<script>{get_plotlyjs()}</script></head>\n<body><h1>{title}</h1><p>{html.escape(lead)}</p>"
        f"<nav>{links}</nav>{body or f'<p>{html.escape(otherwise)}</p>'}</body></html>\n"
    )


def _section(number: int, section: Section) -> str:
    charts = "".join(_chart(f"c{number}-{i}", chart) for i, chart in enumerate(section.charts))
    title, intro = html.escape(section.title), html.escape(section.intro)
    return f'\n<section id="s{number}"><h2>{title}</h2><p>{intro}</p>{charts}</section>'


def _chart(name: str, chart: Chart) -> str:
    chart.figure.update_layout(template="plotly_white", height=480, margin={"t": 60, "b": 40, "l": 60, "r": 20})
    drawn = chart.figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=name, config={"displaylogo": False}, auto_play=False
    )
    return f"\n<h3>{html.escape(chart.title)}</h3><p>{html.escape(chart.note)}</p>{drawn}"


if __name__ == "__main__":
    sys.exit(run_command(main))
