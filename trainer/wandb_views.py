"""How metrics look in Weights & Biases: a vector is a histogram, a matrix a heat map, a list of rows a table.

`wandb` is the module, given by its one importer.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.metrics import Row

_COURSE_POINTS = 60
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


def courses(wandb: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """The course of every vector over a run, one line an element."""
    import plotly.graph_objects as go

    charts = {}
    for key in vector_keys(rows):
        held = [row for row in rows if row.get(key)]
        stride = -(-len(held) // _COURSE_POINTS)
        held = held[-1::-stride][::-1]  # the last one is always there
        figure, steps = go.Figure(layout={"title": key, "xaxis": {"title": "step"}}), [row["step"] for row in held]
        for element in range(len(held[-1][key])):
            figure.add_scatter(x=steps, y=[row[key][element] for row in held], name=str(element))
        charts[f"{key}/course"] = wandb.Plotly(figure)
    return charts


def final_summary(rows: Sequence[Row]) -> dict[str, Any]:
    """What a table of runs is sorted by: the best held-out loss and its step, and where balance has ended."""
    evaluations = [row for row in rows if row.get("eval/loss") is not None]
    if not evaluations:
        return {}
    best, last = min(evaluations, key=lambda row: row["eval/loss"]), evaluations[-1]
    found = {"best/eval_loss": best["eval/loss"], "best/step": best["step"], "final/eval_loss": last["eval/loss"]}
    if last.get("eval/maxvio_global") is not None:
        found["final/maxvio_global"] = last["eval/maxvio_global"]
    return found


def vector_keys(rows: Sequence[Row]) -> list[str]:
    """Metrics that are vectors over the same things in every row, in the order of their first rows.

    Not those of samples, which are others in every step.
    """
    keys = {key: None for row in rows for key, value in row.items() if _is_vector(value) and "/samples/" not in key}
    return list(keys)


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
