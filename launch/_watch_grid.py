"""What `launch.watch` shows of a grid: a line for each run."""

from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from launch._watch_run import RunView, clock, sparkline
from launch.report_sections._grid import GridRun, read_plan
from launch.report_sections._parts import number

_STYLES = {"running": "green", "done": "cyan", "failed": "red", "stopped": "yellow", "waiting": "dim"}


class GridView:
    """A grid as far as its runs have come."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._views: dict[Path, RunView] = {}
        self._plan: list[GridRun] = []
        self._name, self._baseline = folder.name, ""

    def poll(self) -> bool:
        """Read what is new; returns whether anything was."""
        described, plan = read_plan(self.folder)
        changed = plan != self._plan
        self._plan = plan
        self._name, self._baseline = described.get("name") or self.folder.name, described.get("baseline") or ""
        for planned in plan:
            if planned.folder not in self._views:
                self._views[planned.folder] = RunView(planned.folder)
            changed = self._views[planned.folder].poll() or changed
        return changed

    def show(self, width: int, height: int) -> RenderableType:
        """The table for a terminal of this size; runs that do not fit are counted."""
        states = [planned.status for planned in self._plan]
        head = Text.assemble((self._name, "bold"), f"  {len(self._plan)} runs")
        for state in ("done", "running", "waiting", "failed", "stopped"):
            if states.count(state):
                head.append(f"  {states.count(state)} {state}", style=_STYLES[state])
        remaining = self._remaining_s()
        if remaining is not None:
            head.append(f"  at least {clock(remaining)} of steps to go")
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for title, right in (("run", False), ("status", False), ("step", True), ("", False), ("loss", True),
                             ("held-out", True), ("MaxVio", True), ("tokens/s", True),
                             ("course of the loss", False)):  # fmt: skip
            table.add_column(title, justify="right" if right else "left", no_wrap=True)
        # What runs or failed is what one looks for: it stays when the terminal is too low for all.
        order = {"running": 0, "failed": 1, "stopped": 2, "done": 3, "waiting": 4}
        fits = max(3, height - 5)
        shown = sorted(range(len(self._plan)), key=lambda i: (order.get(states[i], 5), i))[:fits]
        for i in sorted(shown):
            table.add_row(*self._row(self._plan[i], width))
        parts: list[RenderableType] = [head, table]
        if len(shown) < len(self._plan):
            parts.append(Text(f"and {len(self._plan) - len(shown)} more", style="dim"))
        failed = [planned for planned in self._plan if planned.reason and planned.status in ("failed", "stopped")]
        parts += [Text(f"{planned.folder.name}: {planned.reason}", style="yellow") for planned in failed[:3]]
        return Group(*parts)

    def _row(self, planned: GridRun, width: int) -> list[RenderableType]:
        run = self._views[planned.folder].run
        share = run.last_step / run.planned_steps if run.planned_steps else 0.0
        speed = run.steps.line("tokens_per_s")[1][-20:]
        name = planned.folder.name + (" (baseline)" if planned.variant == self._baseline else "")
        held_out = run.evals.last("eval/maxvio_global")
        violation = run.steps.last("moe/maxvio_batch") if held_out is None else held_out
        filled = round(8 * min(share, 1.0))
        return [
            name, Text(planned.status, style=_STYLES.get(planned.status, "")), f"{run.last_step:,}",
            "█" * filled + "░" * (8 - filled), number(run.steps.last("loss"), ".3f"),
            number(run.evals.last("eval/loss"), ".4f"),
            number(violation),
            number(float(speed.mean()) if len(speed) else None, ",.0f"),
            sparkline(run.steps.line("loss")[1], max(8, min(32, width - 92))),
        ]  # fmt: skip

    def _remaining_s(self) -> float | None:
        """Seconds of steps of the runs that have begun and are not done."""
        known = [
            eta for planned in self._plan
            if planned.status == "running" and (eta := self._views[planned.folder].eta_s) is not None
        ]  # fmt: skip
        return max(known) if known else None
