"""The figures of NOTES.md: `python -m tests.bench.figures` draws images/growth.png and images/breakdown.png.

From results/growth.json, which tests.bench.growth writes, and results/breakdown.json, which this writes from files of
launch.profile, one for each state of the code, the newest last:

    python -m tests.bench.figures --breakdown "plain torch=runs/before/profile.json" "compiled=runs/after/profile.json"

Charts are plotly's, and a Chromium that is there makes the images (`apt-get install chromium`, or name one in
EVENKEEL_CHROMIUM). Exit code 2 where a file cannot be read or there is no browser.
"""

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench.breakdown_figure import breakdown_figure, take_profiles
from tests.bench.growth_figure import growth_figure
from tests.bench.growth_fit import read_curves
from tests.browser import ARGUMENTS, CHROMIUM

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

BENCH = Path(__file__).parent
SCALE = 1.6  # pixels of an image for one of the page, for dense screens
COLORS = 64  # flat charts have no more, and the files are a third of the size


def main(argv: Sequence[str] | None = None) -> int:
    """Draw; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--breakdown", nargs="+", metavar="LABEL=FILE", help="profile.json of launch.profile, made on this machine, to "
        "write results/breakdown.json from first",
    )  # fmt: skip
    parser.add_argument("--results", type=Path, default=BENCH / "results", help="folder of the JSON files")
    parser.add_argument("--images", type=Path, default=BENCH / "images", help="folder to draw to")
    arguments = parser.parse_args(argv)
    if CHROMIUM is None:
        return _refuse(
            "no Chromium on PATH draws the images; apt-get install chromium, or name one in EVENKEEL_CHROMIUM"
        )
    try:
        if arguments.breakdown:
            take_profiles(arguments.breakdown, arguments.results / "breakdown.json")
        facts, curves = read_curves(arguments.results / "growth.json")
        breakdown = json.loads((arguments.results / "breakdown.json").read_text())
    except (OSError, ValueError, KeyError) as error:
        return _refuse(f"{type(error).__name__}: {error}")
    arguments.images.mkdir(parents=True, exist_ok=True)
    figures = {"growth": growth_figure(facts, curves), "breakdown": breakdown_figure(breakdown)}
    for path in draw(figures, arguments.images):
        sys.stdout.write(f"{path}\n")
    return 0


def draw(figures: "dict[str, Figure]", folder: Path) -> list[Path]:
    """One PNG for each figure, of the size in its layout."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    written = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        for name, figure in figures.items():
            width, height = figure.layout.width, figure.layout.height
            page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=SCALE)
            page.set_content(_page(figure))
            page.wait_for_selector(".main-svg")
            written.append(folder / f"{name}.png")
            picture = Image.open(io.BytesIO(page.screenshot()))
            picture.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(written[-1], optimize=True)
        browser.close()
    return written


def _page(figure: "Figure") -> str:
    options: dict[str, Any] = {"staticPlot": True, "displayModeBar": False}
    chart = figure.to_html(full_html=False, include_plotlyjs=True, config=options)
    return f'<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">{chart}'


def _refuse(why: str) -> int:
    sys.stderr.write(f"error: {why}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
