"""The report in a real Chromium: it draws without a complaint, asks nothing of the network, and reacts.

Skipped, with the reason, where playwright or a Chromium is missing: `apt-get install chromium`, or name one in
EVENKEEL_CHROMIUM.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch import report
from launch._cli import run_command
from tests.browser import ARGUMENTS, CHROMIUM, NAMES
from tests.launch.run_folders import evaluation, training_rows, write_grid, write_run

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"no browser: none of {', '.join(NAMES)} is on PATH")

ALL_DRAWN = "[...document.querySelectorAll('figure[data-figure]')].every(figure => figure.dataset.drawn)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def one_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with loads, biases, weights and samples, long enough to have something to slide through."""
    table = training_rows(60)
    for row in table:
        row |= {"moe/layer0/maxvio": 0.3, "moe/maxvio_batch": 0.3, "reweight/ess": 0.9, "reweight/max_weight": 1.4,
                "reweight/temperature": 1.0}  # fmt: skip
        if row["step"] % 10 == 1:
            samples = {"loss": [row["loss"] + i for i in range(8)], "weight": [0.6 + 0.1 * i for i in range(8)]}
            row |= {"reweight/samples/tokens": [64] * 8} | {f"reweight/samples/{k}": v for k, v in samples.items()}
    evaluations = [evaluation(step, 6 - step / 30, maxvio=1 - step / 80) for step in (0, 20, 40, 60)]
    folder = write_run(tmp_path_factory.mktemp("page") / "run", [*table, *evaluations], steps=60)
    assert run_command(report.main, [str(folder)]) == 0
    return folder / "report.html"


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    losses = {"none": [4.0, 4.1, 4.2], "sign": [3.5, 3.62, 3.69], "quantile": [4.01, 4.08, 4.22]}
    folder = write_grid(tmp_path_factory.mktemp("pages") / "grid", losses)
    assert run_command(report.main, [str(folder)]) == 0
    return folder / "report.html"


class Opened:
    """A page and everything that went wrong on it."""

    def __init__(self, browser: Any, path: Path, **context: Any) -> None:
        self.context = browser.new_context(
            **{"viewport": {"width": 1280, "height": 900}, "accept_downloads": True, **context}
        )
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._asked)
        self.page.goto(path.as_uri())

    def _asked(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            self.complaints.append(f"request: {request.url}")

    def draw_all(self) -> None:
        """Charts are drawn when they come near: as printing does, ask for all at once."""
        self.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
        self.page.wait_for_function(ALL_DRAWN)

    def figure(self, title: str) -> Any:
        return self.page.locator("figure", has=self.page.get_by_role("heading", name=title, exact=True))

    def data(self, title: str) -> Any:
        """What plotly drew in a chart."""
        drawn = "node => { const plot = node.querySelector('.plot'); return { data: plot.data, layout: plot.layout }; }"
        return self.figure(title).evaluate(drawn)

    def wait_redrawn(self, title: str, act: Any) -> None:
        """Do something and wait until the chart has been drawn again."""
        figure = self.figure(title)
        before = int(figure.get_attribute("data-drawn"))
        act()
        self.page.wait_for_function(
            "([node, before]) => +node.dataset.drawn > before", arg=[figure.element_handle(), before]
        )


@pytest.fixture
def desk(browser: Any, one_run: Path) -> Iterator[Opened]:
    opened = Opened(browser, one_run)
    opened.draw_all()
    yield opened
    assert opened.complaints == []
    opened.context.close()


def test_complaints_are_seen(browser: Any, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text('<script>console.error("broken")</script><img src="http://127.0.0.1:9/x.png"><script>no()</script>')
    opened = Opened(browser, bad)
    opened.page.wait_for_timeout(200)
    for complaint in ("broken", "request: http://127.0.0.1:9/x.png", "no is not defined"):
        assert any(complaint in each for each in opened.complaints), opened.complaints
    opened.context.close()


def test_slider_and_menus_change_what_is_drawn(desk: Opened) -> None:
    title = "Held-out load of each expert"
    slider = desk.figure(title).locator("input[type=range]")
    assert (slider.get_attribute("max"), slider.input_value()) == ("3", "3")
    assert desk.data(title)["data"][0]["customdata"][0][0] == pytest.approx(1.25)
    desk.wait_redrawn(title, lambda: slider.fill("0"))
    assert desk.data(title)["data"][0]["customdata"][0][0] == pytest.approx(2.0)
    assert desk.figure(title).locator("output").inner_text() == "step 0"
    menu = desk.figure(title).locator("select")
    desk.wait_redrawn(title, lambda: menu.select_option("layer 0 over time"))
    course = desk.data(title)["data"][0]
    assert course["x"] == [0, 20 * 512, 40 * 512, 60 * 512], "evaluations, in tokens"
    assert course["customdata"][0] == pytest.approx([2.0, 1.75, 1.5, 1.25])
    assert not slider.is_visible()
    shown = "Domains over time"
    before = desk.data(shown)["data"][0]["y"]
    desk.wait_redrawn(shown, lambda: desk.figure(shown).locator("select").select_option("share of tokens"))
    assert desk.data(shown)["data"][0]["y"] != before
    assert set(desk.data(shown)["data"][0]["y"]) == {0.5}


def test_the_horizontal_axis_is_chosen_for_the_page(desk: Opened) -> None:
    title = "Training loss"
    assert desk.data(title)["data"][0]["x"][-1] == 60 * 512
    desk.wait_redrawn(title, lambda: desk.page.get_by_role("button", name="hours").click())
    drawn = desk.data(title)
    assert drawn["data"][0]["x"][-1] == pytest.approx(60 * 0.1 / 3600, rel=1e-3)
    assert drawn["layout"]["xaxis"]["title"]["text"] == "hours of training"
    desk.wait_redrawn(title, lambda: desk.page.get_by_role("button", name="step", exact=True).click())
    assert desk.data(title)["data"][0]["x"] == list(range(1, 61))
    labels = [note["text"] for note in desk.data(title)["layout"]["annotations"]]
    assert labels == ["training", "held-out"] or labels == ["held-out", "training"]


def test_plots_and_their_numbers_are_saved_without_a_network(desk: Opened) -> None:
    desk.context.set_offline(True)
    starts = {"PNG": b"\x89PNG", "SVG": b"<svg", "CSV": b"frame,series,column,row,value\n0,,0,0,"}
    for kind, start in starts.items():
        with desk.page.expect_download() as download:
            desk.figure("Held-out load of each expert").get_by_role("button", name=kind).click()
        content = Path(download.value.path()).read_bytes()
        assert content.startswith(start), content[:80]
        assert download.value.suggested_filename == f"run-held-out-load-of-each-expert-all-layers.{kind.lower()}"
    assert len(content.decode().splitlines()) == 1 + 4 * 4, "a line for each expert and evaluation"


def test_a_run_without_tokens_is_drawn_over_its_steps(browser: Any, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "bare", [{"step": n, "loss": 9.0 - n} for n in range(1, 5)])
    assert run_command(report.main, [str(folder)]) == 0
    opened = Opened(browser, folder / "report.html")
    opened.draw_all()
    drawn = opened.data("Training loss")
    assert drawn["data"][0]["x"] == [1, 2, 3, 4]
    assert drawn["layout"]["xaxis"]["title"]["text"] == "optimizer step"
    assert opened.complaints == []
    opened.context.close()


def test_dark_follows_the_system_and_the_button(browser: Any, one_run: Path) -> None:
    opened = Opened(browser, one_run, color_scheme="dark")
    opened.draw_all()
    paper = opened.data("MaxVio")["layout"]["paper_bgcolor"]
    assert paper == "#171b1f"
    assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 19, 22)"
    opened.wait_redrawn("MaxVio", lambda: opened.page.locator("#theme").click())
    assert opened.data("MaxVio")["layout"]["paper_bgcolor"] == "#ffffff"
    opened.page.emulate_media(color_scheme="light")
    opened.wait_redrawn("MaxVio", lambda: opened.page.locator("#theme").click())
    assert opened.data("MaxVio")["layout"]["paper_bgcolor"] == paper, "what was chosen by hand stays"
    assert opened.complaints == []
    opened.context.close()


@pytest.mark.parametrize("kind", ["one_run", "grid"])
def test_a_phone_shows_it_without_sideways_scrolling(browser: Any, kind: str, request: pytest.FixtureRequest) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
    opened = Opened(browser, request.getfixturevalue(kind), **phone)
    opened.draw_all()
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 390
    wide = "[...document.querySelectorAll('.plot, .card')].filter(n => n.getBoundingClientRect().right > 390).length"
    assert opened.page.evaluate(wide) == 0
    assert opened.complaints == []
    opened.context.close()


def test_charts_are_drawn_when_they_come_into_sight(browser: Any, one_run: Path) -> None:
    opened = Opened(browser, one_run)
    opened.page.wait_for_function("document.querySelectorAll('figure[data-drawn]').length > 0")
    opened.page.wait_for_timeout(300)
    assert opened.figure("Memory").get_attribute("data-drawn") is None
    opened.page.get_by_role("link", name="Speed and memory").first.click()
    opened.page.wait_for_function("document.querySelector('#speed-and-memory figure').dataset.drawn")
    opened.page.wait_for_function("document.querySelector('nav a.here')?.textContent === 'Speed and memory'")
    assert opened.complaints == []
    opened.context.close()


def test_a_grid_compares_its_variants(browser: Any, grid: Path) -> None:
    opened = Opened(browser, grid)
    opened.draw_all()
    drawn = opened.data("Difference from the baseline")["data"]
    dots = next(trace for trace in drawn if trace["name"] == "sign")
    assert dots["x"] == pytest.approx([-0.5, -0.48, -0.51])
    menu = opened.figure("Difference from the baseline").locator("select")
    opened.wait_redrawn("Difference from the baseline", lambda: menu.select_option("MaxVio, held-out"))
    labels = [note["text"] for note in opened.data("Training loss")["layout"]["annotations"]]
    assert sorted(labels) == ["none", "quantile", "sign"], "variants are named at the ends of their lines"
    menus = opened.figure("Held-out load of each expert").locator("select")
    opened.wait_redrawn("Held-out load of each expert", lambda: menus.first.select_option("sign-2"))
    assert menus.nth(1).input_value() == "all layers"
    assert opened.complaints == []
    opened.context.close()
