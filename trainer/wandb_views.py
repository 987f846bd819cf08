"""How metrics look in Weights & Biases: a vector is a histogram, a matrix a heat map, a list of rows a table.

`wandb` is the module, given by its one importer.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.metrics import EvenRows, Row

_COURSE_POINTS = 60
_EVALUATION = '"eval/loss"'
_SECRET = re.compile(r"(^|_)(secret|password|passwd|api_?key|credentials?|access_?token|auth_?token)s?$", re.IGNORECASE)


def is_media(value: Any) -> bool:
    """Whether a value becomes a file of its own: matrices and tables do, histograms ride in the row."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], (list, dict))


def shown(wandb: Any, key: str, value: Any, *, domain_names: Sequence[str], table_rows: int, texts: bool) -> Any:
    """The value as W&B draws it. `texts`: whether a table may hold excerpts of the training data."""
    if not isinstance(value, list):
        return value
    if value and isinstance(value[0], dict):
        columns = [name for name in value[0] if texts or name != "text"]
        half = table_rows // 2
        rows = value if len(value) <= table_rows else value[: table_rows - half] + value[len(value) - half :]
        return wandb.Table(columns=columns, data=[[row.get(name) for name in columns] for row in rows])
    if not is_media(value):
        return wandb.Histogram([item for item in value if item is not None])
    import plotly.graph_objects as go

    by_domain = key.rpartition("/")[2].startswith("domain_") and len(domain_names) == len(value)
    names = list(domain_names) if by_domain else list(map(str, range(len(value))))
    heat = go.Heatmap(z=value, y=names, colorscale="Viridis", hoverongaps=False)
    title = f"{key}: {'domains' if by_domain else 'layers'} x experts"
    layout = {"title": title, "yaxis": {"autorange": "reversed", "type": "category"}}
    return wandb.Plotly(go.Figure(heat, layout))


class WholeRun:
    """What is said of a run when it ends, earlier starts included, gathered from its rows; small whatever its length.

    That is the best and the last evaluation, and points of the course of every vector over the same things in every
    row: not those of samples, which are others in every step.
    """

    def __init__(self) -> None:
        self._courses: dict[str, EvenRows] = {}
        self._best: Row = {}
        self._last: Row = {}
        self._newest: Row = {}
        self._unread = ""

    def add_line(self, line: str) -> None:
        """Take the next line of metrics.jsonl. Most hold nothing that is kept, and are not parsed."""
        if "[" in line or _EVALUATION in line:
            self._parse(line)
        else:
            self._unread = line

    def add(self, row: Row) -> None:
        """Take the next row."""
        self._newest, self._unread = {"step": row["step"]}, ""
        for key, value in row.items():
            if _is_vector(value) and value and "/samples/" not in key:
                self._courses.setdefault(key, EvenRows(_COURSE_POINTS // 2)).add({"step": row["step"], "value": value})
        if row.get("eval/loss") is not None:
            kept = {key: row.get(key) for key in ("step", "eval/loss", "eval/maxvio_global")}
            self._last = kept
            if not self._best or kept["eval/loss"] < self._best["eval/loss"]:
                self._best = kept

    def _parse(self, line: str) -> None:
        try:
            row = json.loads(line)
            if isinstance(row["step"], int):
                self.add(row)
        except (ValueError, KeyError, TypeError):
            return  # what a crash has cut: the view does without

    @property
    def step(self) -> int | None:
        """The newest step; None without rows."""
        if self._unread:
            self._parse(self._unread)
        return self._newest.get("step")

    def courses(self, wandb: Any) -> dict[str, Any]:
        """The course of every vector over the run, one line an element."""
        import plotly.graph_objects as go

        charts = {}
        for key, course in self._courses.items():
            held = course.rows()
            figure, steps = go.Figure(layout={"title": key, "xaxis": {"title": "step"}}), [row["step"] for row in held]
            for element in range(len(held[-1]["value"])):
                figure.add_scatter(x=steps, y=[row["value"][element] for row in held], name=str(element))
            charts[f"{key}/course"] = wandb.Plotly(figure)
        return charts

    def summary(self) -> dict[str, Any]:
        """What a table of runs is sorted by: the best held-out loss and its step, and where balance has ended."""
        if not self._best:
            return {}
        found = {
            "best/eval_loss": self._best["eval/loss"],
            "best/step": self._best["step"],
            "final/eval_loss": self._last["eval/loss"],
        }
        if self._last["eval/maxvio_global"] is not None:
            found["final/maxvio_global"] = self._last["eval/maxvio_global"]
        return found


def _is_vector(value: Any) -> bool:
    return isinstance(value, list) and not is_media(value)


def allowed_config(config: Mapping[str, Any], allowed: Sequence[str], prefix: str = "") -> dict[str, Any]:
    """The part of a nested config that may leave the machine: keys on the list, or below one, and no secret's name."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        listed = any(path == name or path.startswith(f"{name}.") for name in allowed)
        if isinstance(value, Mapping):
            if inner := allowed_config(value, allowed, f"{path}."):
                found[key] = inner
        elif listed and not (isinstance(value, str) and _SECRET.search(str(key))):
            found[key] = value
    return found
