"""A best-effort copy of the metrics in Weights & Biases. Its only importer.

metrics.jsonl is the record of the run; this is a view of it. Everything happens on a daemon thread behind a bounded
queue: whatever W&B does (refuses, hangs, dies), training neither waits nor ends. No code and no console output is
uploaded; keys come from the environment or netrc and are never written.
"""

import hashlib
import logging
import netrc
import os
import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

log = logging.getLogger("evenkeel")

_QUEUE_ROWS = 10_000
_INIT_TIMEOUT_S = 10


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
        self, config: WandbConfig, *, run_dir: Path, run_name: str, resolved_config: Mapping[str, Any]
    ) -> None:
        self._config, self._run_dir, self._run_name = config, run_dir, run_name
        self._resolved_config = dict(resolved_config)
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
                run.log({key: _shown(value) for key, value in row.items() if value is not None})
            except Exception as error:
                self._warn(f"failed ({type(error).__name__}: {error})")
                run = None
        if run is not None:
            try:
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

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("W&B %s; training goes on, metrics.jsonl is complete", what)


def _shown(value: Any) -> Any:
    """A vector becomes a histogram, so that its course over the run can be seen."""
    if not isinstance(value, list):
        return value
    import wandb

    return wandb.Histogram([item for item in value if item is not None])


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
