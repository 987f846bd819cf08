"""Draw runs: `python -m launch.report RUN [RUN ...]`, or `python -m launch.report GRID`.

Writes ONE self-contained HTML file: it needs no network and may be moved or mailed. One run gives report.html in its
folder (launch.train writes it too, when a run ends); several give one page that compares them; the folder of a grid
(launch.ablate) gives a comparison of its variants with paired differences and intervals. What the page shows, figure by
figure, is in launch/REPORT.md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from launch._cli import run_command
from launch._replace_file import replace_file
from launch.report_sections import SECTIONS
from launch.report_sections._grid import GridRecord, is_grid
from launch.report_sections._page import html_page
from launch.report_sections._record import RunRecord
from launch.report_sections.grid import comparison
from launch.report_sections.overview import lead
from launch.report_sections.tables import write_csv
from trainer.errors import ConfigError, StorageError

FILE = "report.html"


def main(argv: list[str]) -> int:
    """Write the report; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN|GRID", help="run folders, or the folder of one grid")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where to write; default: report.html in the folder that is drawn, "
        "or, for several runs, in the folder that holds the first",
    )  # fmt: skip
    parser.add_argument("--csv", type=Path, metavar="DIR", help="also write the numbers, not thinned, as CSV files")
    arguments = parser.parse_intermixed_args(argv)
    folders: list[Path] = arguments.runs
    grids = [folder for folder in folders if is_grid(folder)]
    if grids and len(folders) > 1:
        raise ConfigError(f"{grids[0]}: is a grid, and is drawn alone; name only this folder, or only run folders")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("a run is named twice; name each once")
    grid = GridRecord.read(grids[0]) if grids else None
    runs = grid.runs if grid else [RunRecord.read(folder) for folder in folders]
    default = folders[0] / FILE if len(folders) == 1 else folders[0].resolve().parent / FILE
    written = [write_page(arguments.out or default, page_of_grid(grid) if grid else page(_distinct(runs)))]
    if arguments.csv:
        written += write_csv(arguments.csv, runs, grid)
    sys.stdout.writelines(f"{path}\n" for path in written)
    return 0


def write_report(run_dir: Path) -> Path:
    """Write the report of one run and return its path.

    Raises ConfigError if the folder has no metrics, StorageError if the disk refuses.
    """
    return write_page(run_dir / FILE, page([RunRecord.read(run_dir)]))


def page(runs: Sequence[RunRecord]) -> str:
    """The whole page of one or several runs."""
    name = (
        runs[0].name if len(runs) == 1 else " · ".join(run.name for run in runs[:4]) + (" …" if len(runs) > 4 else "")
    )
    sections = [section for draw in SECTIONS if (section := draw(runs)) is not None]
    return html_page(name, lead(runs), sections, runs=runs)


def page_of_grid(grid: GridRecord) -> str:
    """The whole page of a grid."""
    sections = [*comparison(grid), *(section for draw in SECTIONS if (section := draw(grid.runs)) is not None)]
    return html_page(grid.name, grid.lead, sections, runs=grid.runs)


def write_page(path: Path, text: str) -> Path:
    """Write a page, whole or not at all. Raises ConfigError for a folder, StorageError if the disk refuses."""
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; name a file with --out")
    try:
        replace_file(path, text)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}; free space or choose another --out") from error
    return path


def _distinct(runs: Sequence[RunRecord]) -> Sequence[RunRecord]:
    """Runs whose folders have the same name are told apart by the folder above."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1 and run.folder is not None:
            run.name = f"{run.folder.resolve().parent.name}/{run.name}"
    return runs


if __name__ == "__main__":
    sys.exit(run_command(main))
