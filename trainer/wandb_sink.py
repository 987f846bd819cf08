"""A best-effort copy of the metrics in Weights & Biases. Its only importer.

metrics.jsonl is the record of the run; this is a view of it: numbers become lines, a vector a histogram and,
when the run ends, a chart of its course, a matrix a heat map. Everything happens on a daemon thread behind a bounded
queue: whatever W&B does (refuses, hangs, dies), training neither waits nor ends. No code and no console output is
uploaded; keys come from the environment or netrc and are never written.
"""

import hashlib
import logging
import netrc
import os
import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from trainer.errors import ConfigError
from trainer.metrics import Row, read_jsonl

log = logging.getLogger("evenkeel")

_QUEUE_ROWS = 10_000
_INIT_TIMEOUT_S = 10
_COURSE_POINTS = 60


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Where the copy of the metrics goes."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto is online if an API key is set, else offline (in the run folder, for `wandb sync`)."""
    project: str = "evenkeel"
    """W&B project."""
    entity: str = ""
    """User or team; empty is the key's default."""
    group: str = ""
    """Group of the run, for ablations."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        return [] if self.project else ["project: is empty; name one, or set mode to disabled"]


class WandbSink:
    """Copies rows to W&B from a thread of its own."""

    def __init__(
        self,
        config: WandbConfig,
        *,
        run_dir: Path,
        run_name: str,
        resolved_config: Mapping[str, Any],
        domain_names: Sequence[str] = (),
    ) -> None:
        """`domain_names` label the rows of matrices whose name ends in `/domain_...`."""
        self._config, self._run_dir, self._run_name = config, run_dir, run_name
        self._resolved_config = dict(resolved_config)
        self._domain_names = list(domain_names)
        self._rows: queue.Queue[Mapping[str, Any] | None] = queue.Queue(_QUEUE_ROWS)
        self._warned = False
        self._thread: threading.Thread | None = None
        if config.mode != "disabled":
            self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
            self._thread.start()

    def log(self, row: Mapping[str, Any]) -> None:
        """Queue one row; drops it if W&B has fallen far behind."""
        if self._thread is None:
            return
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._warn("is too slow: some rows are missing there")

    def close(self, timeout_s: float = 15.0) -> None:
        """Let queued rows go out, for at most `timeout_s` seconds."""
        if self._thread is None:
            return
        try:
            self._rows.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._warn("did not finish in time: its copy may be incomplete")

    def _work(self) -> None:
        run = self._start()
        while (row := self._rows.get()) is not None:
            if run is None:
                continue
            try:
                run.log({key: self._shown(key, value) for key, value in row.items() if value is not None})
            except Exception as error:
                self._warn(f"failed ({type(error).__name__}: {error})")
                run = None
        if run is not None:
            try:
                self._log_courses(run)
                run.finish()
            except Exception as error:
                self._warn(f"failed at the end ({type(error).__name__}: {error})")

    def _start(self) -> Any:
        mode = self._config.mode
        if mode == "auto":
            mode = "online" if _has_key() else "offline"
        for attempt in dict.fromkeys((mode, "offline")):
            try:
                return self._init(attempt)
            except Exception as error:
                self._warn(f"cannot start {attempt} ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})")
        return None

    def _init(self, mode: str) -> Any:
        import wandb

        run = wandb.init(
            mode="online" if mode == "online" else "offline",
            project=self._config.project,
            entity=self._config.entity or None,
            group=self._config.group or None,
            tags=list(self._config.tags),
            name=self._run_name,
            id=run_id(self._run_dir),
            resume="allow",
            dir=str(self._run_dir),
            config=self._resolved_config,
            settings=wandb.Settings(
                init_timeout=_INIT_TIMEOUT_S, console="off", save_code=False, disable_git=True, silent=True
            ),
        )
        run.define_metric("*", step_metric="step")
        return run

    def _shown(self, key: str, value: Any) -> Any:
        """The value as W&B draws it."""
        if not isinstance(value, list):
            return value
        import wandb

        if value and isinstance(value[0], dict):
            return wandb.Table(columns=list(value[0]), data=[list(row.values()) for row in value])
        if not _is_matrix(value):
            return wandb.Histogram([item for item in value if item is not None])
        import plotly.graph_objects as go

        by_domain = key.rpartition("/")[2].startswith("domain_") and len(self._domain_names) == len(value)
        names = self._domain_names if by_domain else list(map(str, range(len(value))))
        heat = go.Heatmap(z=value, y=names, colorscale="Viridis", hoverongaps=False)
        return wandb.Plotly(go.Figure(heat, {"yaxis": {"autorange": "reversed", "type": "category"}}))

    def _log_courses(self, run: Any) -> None:
        """Draw the course of every vector over the whole run, earlier starts included, one line an element."""
        try:
            rows = read_jsonl(self._run_dir / "metrics.jsonl")
        except ConfigError:
            return
        import plotly.graph_objects as go
        import wandb

        charts = {}
        for key in vector_keys(rows):
            held = [row for row in rows if row.get(key)]
            stride = -(-len(held) // _COURSE_POINTS)
            held = held[-1::-stride][::-1]  # the last one is always there
            figure, steps = go.Figure(layout={"title": key, "xaxis": {"title": "step"}}), [row["step"] for row in held]
            for element in range(len(held[-1][key])):
                figure.add_scatter(x=steps, y=[row[key][element] for row in held], name=str(element))
            charts[f"{key}/course"] = wandb.Plotly(figure)
        if charts:
            run.log({"step": rows[-1]["step"], **charts})

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("W&B %s; training goes on, metrics.jsonl is complete", what)


def vector_keys(rows: Sequence[Row]) -> list[str]:
    """Metrics that are vectors over the same things in every row, in the order of their first rows.

    Not those of samples, which are others in every step.
    """
    keys = {key: None for row in rows for key, value in row.items() if _is_vector(value) and "/samples/" not in key}
    return list(keys)


def _is_vector(value: Any) -> bool:
    return isinstance(value, list) and not (value and isinstance(value[0], (list, dict)))


def _is_matrix(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], list)


def run_id(run_dir: Path) -> str:
    """A W&B id that is the same whenever the same folder is started."""
    return hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:12]


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
