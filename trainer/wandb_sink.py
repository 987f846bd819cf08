"""A best-effort copy of the metrics in Weights & Biases. Its only importer.

metrics.jsonl is the record of the run; this is a view of it (trainer/wandb_views.py), with alerts
(trainer/wandb_alerts.py).

Decisions:
- Everything happens on a daemon thread behind a bounded queue: whatever W&B does (refuses, hangs, dies), training
  neither waits nor ends. What is missing there is counted, said once, and sent later by `launch.wandb sync`.
- The id of the W&B run lies in the run folder: a run that is started again is the same run there.
- What is said of the whole run at its end, earlier starts included, comes from metrics.jsonl, which has every row. The
  thread follows that file while the run goes on, so that little is left to read when it ends, and none of it is kept.
- Heat maps and tables are files, so they go up at most once in `media_every_s` seconds each; the last one always does.
- Nothing goes up but metrics, the keys of the config that are on a list, and system figures: no code, no git state, no
  command line, no host name, no text of the training data unless `texts` says so. API keys come from the environment or
  netrc and are never written.
"""

import logging
import netrc
import os
import queue
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import psutil

from trainer.errors import StorageError
from trainer.line_tail import LineTail
from trainer.metrics import iter_jsonl
from trainer.wandb_alerts import AlertRules, Level, ending
from trainer.wandb_views import WholeRun, allowed_config, is_media, shown

log = logging.getLogger("evenkeel")

ID_FILE = "wandb-id"
"""File in the run folder with the id of the W&B run."""
_QUEUE_ROWS = 10_000
_INIT_TIMEOUT_S = 10
_END_TIMEOUT_S = 5
_REPLAYED_MEDIA = 20
_FOLLOWED_ROWS = 500


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Where the copy of the metrics goes, and what goes with it."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto is online if an API key is set, else offline (in the run folder, for `launch.wandb sync`)."""
    project: str = "evenkeel"
    """W&B project."""
    entity: str = ""
    """User or team; empty is the key's default."""
    group: str = ""
    """Group of the run, for ablations."""
    job_type: str = "train"
    """What kind of run it is, within a group."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""
    media_every_s: float = 300.0
    """Seconds between two heat maps or tables of the same name."""
    table_rows: int = 20
    """Rows of a table at most: the heaviest and the lightest documents."""
    texts: bool = False
    """Whether the table of documents shows how they begin: training data then leaves the machine."""
    alert_every_s: float = 1800.0
    """Seconds between two alerts of a kind (loss spike, step skipped, dead experts, slow rank, run failed); 0: none."""
    system_metrics: bool = True
    """Whether W&B samples CPU, memory and GPUs of the first node."""
    config_keys: tuple[str, ...] = (
        "name", "seed", "model", "train", "optimizer", "schedule", "engine", "evaluation", "checkpoint", "hooks",
        "data.vocab_size", "data.packing", "data.weights", "data.phases", "data.max_epochs",
    )  # fmt: skip
    """What of the configuration is shown there: keys, or sections. Paths and sources of data are not among them."""

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        found = [] if self.project else ["project: is empty; name one, or set mode to disabled"]
        found += [
            f"{name}: {getattr(self, name)} must not be negative"
            for name in ("media_every_s", "alert_every_s")
            if not getattr(self, name) >= 0
        ]
        if self.table_rows < 1:
            found.append(f"table_rows: {self.table_rows} must be at least 1")
        if any(not 1 <= len(tag) <= 64 for tag in self.tags):
            found.append("tags: W&B takes 1 to 64 characters each")
        return found


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
        self._shown_config = allowed_config(resolved_config, config.config_keys)
        self._domain_names = list(domain_names)
        self._rules = AlertRules(config.alert_every_s)
        self._queue: queue.Queue[Mapping[str, Any] | tuple[str, str, Level] | None] = queue.Queue(_QUEUE_ROWS)
        self._media_at: dict[str, float] = {}
        self._late_media: dict[str, Any] = {}
        self._record, self._whole, self._since_followed = LineTail(run_dir / "metrics.jsonl"), WholeRun(), 0
        self._dropped = 0
        self._warned = False
        self._thread: threading.Thread | None = None
        if config.mode != "disabled":
            self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
            self._thread.start()

    def log(self, row: Mapping[str, Any]) -> None:
        """Queue one row; it is dropped, and counted, if W&B has fallen far behind."""
        self._put(row)

    def alert(self, title: str, text: str, level: Level = "WARN") -> None:
        """Queue an alert of the kind that its title names."""
        self._put((title, text, level))

    def close(self, timeout_s: float = 15.0, *, error: BaseException | None = None) -> None:
        """Let what is queued go out, for at most `timeout_s` seconds; `error`: what has ended the run."""
        if self._thread is None:
            return
        deadline = time.monotonic() + timeout_s
        if error is not None:
            self.alert(*ending(error))
        try:
            self._queue.put(None, timeout=timeout_s)
        except queue.Full:
            self._dropped += self._queue.qsize()
        else:
            self._thread.join(max(0.0, deadline - time.monotonic()))
            if self._thread.is_alive():
                self._warn("did not finish in time: its copy may be incomplete")
                _kill_service()
        if self._dropped:
            self._warn(f"was too slow: {self._dropped} rows are missing there")

    def _put(self, item: Mapping[str, Any] | tuple[str, str, Level]) -> None:
        if self._thread is None:
            return
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._dropped += 1

    def _work(self) -> None:
        run = self._start()
        while (item := self._queue.get()) is not None:
            if run is None:
                self._dropped += isinstance(item, Mapping)
                continue
            try:
                self._send(run, item)
            except Exception as error:
                self._warn(f"failed ({type(error).__name__}: {error})")
                run = None
        if run is not None:
            try:
                self._finish(run)
            except Exception as error:
                self._warn(f"failed at the end ({type(error).__name__}: {error})")

    def _start(self) -> Any:
        mode = self._config.mode
        if mode == "auto":
            mode = "online" if has_key() else "offline"
        for attempt in dict.fromkeys((mode, "offline")):
            try:
                return open_run(
                    self._config,
                    attempt,
                    run_dir=self._run_dir,
                    run_name=self._run_name,
                    config_shown=self._shown_config,
                )
            except Exception as error:
                self._warn(f"cannot start {attempt} ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})")
                end_service()
        return None

    def _send(self, run: Any, item: Mapping[str, Any] | tuple[str, str, Level]) -> None:
        if isinstance(item, tuple):
            alerts = [alert] if (alert := self._rules.said(*item)) is not None else []
        else:
            self._log(run, item)
            alerts = self._rules.look(item)
            if self._since_followed % _FOLLOWED_ROWS == 0:  # at first what earlier starts have written
                self._follow()
            self._since_followed += 1
        for alert in alerts:
            # W&B's own limit is off: ours has spoken.
            run.alert(title=alert.title, text=alert.text, level=alert.level, wait_duration=1)

    def _log(self, run: Any, row: Mapping[str, Any]) -> None:
        plain, media = {}, {}
        for key, value in row.items():
            if value is None:
                continue
            if not is_media(value):
                plain[key] = self._view(key, value)
            elif time.monotonic() - self._media_at.get(key, -float("inf")) >= self._config.media_every_s:
                media[key] = value
                self._late_media.pop(key, None)
            else:
                self._late_media[key] = {"step": row["step"], "value": value}
        run.log(plain)
        if media:
            self._log_media(run, {"step": row["step"]}, media)

    def _log_media(self, run: Any, at: dict[str, Any], media: Mapping[str, Any]) -> None:
        """Numbers go on where a picture fails: tables ask the server, and it may not know an answer."""
        self._media_at |= dict.fromkeys(media, time.monotonic())
        try:
            run.log(at | {key: self._view(key, value) for key, value in media.items()})
        except Exception as error:
            self._warn(f"took no heat maps or tables ({type(error).__name__}: {error})")

    def _finish(self, run: Any) -> None:
        for key, held in self._late_media.items():
            self._log_media(run, {"step": held["step"]}, {key: held["value"]})
        self._follow()
        close_run(run, self._whole)

    def _follow(self) -> None:
        """Take what the record of the run has become since the last time."""
        while True:
            lines, began_anew = self._record.poll()
            if began_anew:
                self._whole = WholeRun()
            if not lines:
                return
            for line in lines:
                self._whole.add_line(line)

    def _view(self, key: str, value: Any) -> Any:
        import wandb

        config = self._config
        return shown(
            wandb, key, value,
            domain_names=self._domain_names, table_rows=config.table_rows, texts=config.texts,
        )  # fmt: skip

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "W&B %s; training goes on, metrics.jsonl is complete (python -m launch.wandb sync %s sends it later)",
                *(what, self._run_dir),
            )


def open_run(config: WandbConfig, mode: str, *, run_dir: Path, run_name: str, config_shown: Mapping[str, Any]) -> Any:
    """Start or resume the W&B run of a run folder. Raises what W&B raises."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # crash reports would go to a third party
    import wandb

    run = wandb.init(
        mode="online" if mode == "online" else "offline",
        project=config.project,
        entity=config.entity or None,
        group=config.group or None,
        job_type=config.job_type or None,
        tags=list(config.tags),
        name=run_name,
        id=run_id(run_dir),
        resume="allow",
        dir=str(run_dir),
        config=dict(config_shown),
        settings=wandb.Settings(
            init_timeout=_INIT_TIMEOUT_S,
            console="off",
            silent=True,
            save_code=False,
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,  # command line, host, user
            host="",
            program="",
            x_save_requirements=False,
            x_disable_stats=not config.system_metrics,
        ),
    )
    run.define_metric("*", step_metric="step")
    run.define_metric("eval/loss", step_metric="step", summary="min")
    return run


def end_service() -> None:
    """End W&B's own process: it holds the id of the run that it could not start, and would refuse it from now on."""
    import wandb

    try:
        wandb.teardown()
    except (Exception, SystemExit) as error:  # it passes on the exit code of its process in this way
        log.debug("W&B did not end cleanly: %r", error)


def _kill_service() -> None:
    """End W&B's own process: when Python exits it would be waited for, for as long as it tries to reach its server."""
    for process in psutil.Process().children():
        with suppress(psutil.Error):
            if process.name().startswith("wandb-core"):
                process.kill()
    # W&B has a hook at exit, which finds nothing to complain of after this.
    ending = threading.Thread(target=end_service, daemon=True)
    ending.start()
    ending.join(_END_TIMEOUT_S)


def close_run(run: Any, whole: WholeRun) -> None:
    """Send what needs the whole run and finish."""
    import wandb

    if whole.step is not None:
        if charts := whole.courses(wandb):
            run.log({"step": whole.step, **charts})
        run.summary.update(whole.summary())
    run.finish()


def send_rows(
    config: WandbConfig,
    *,
    run_dir: Path,
    run_name: str,
    resolved_config: Mapping[str, Any],
    everything: bool = False,
) -> int:
    """Send what a run folder has recorded and W&B does not have yet; returns how many rows that was.

    `everything`: also steps that are there already, in case some in the middle are missing. Heat maps and tables go
    with at most twenty rows, first and last among them. Waits for the server. Reads metrics.jsonl twice, row by row.

    Raises ConfigError if metrics.jsonl is missing or damaged, StorageError if the server cannot be reached.
    """
    import wandb

    path = run_dir / "metrics.jsonl"
    try:
        run = open_run(
            config, "online", run_dir=run_dir, run_name=run_name,
            config_shown=allowed_config(resolved_config, config.config_keys),
        )  # fmt: skip
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise StorageError(f"W&B: cannot open the run of {run_dir}: {reason}; nothing was sent") from error
    last = None if everything else run.summary.get("step")
    domains: list[str] | None = None
    pictured, whole, sent = [], WholeRun(), 0
    for row in iter_jsonl(path):
        if domains is None and "loss" in row:
            domains = [key.split("/")[1] for key in row if key.startswith("domain/") and key.endswith("/tokens")]
        if (last is None or row["step"] > last) and any(map(is_media, row.values())):
            pictured.append(row["step"])
    pictured = pictured[:: -(-len(pictured) // _REPLAYED_MEDIA) or 1] + pictured[-1:]
    view = partial(shown, wandb, domain_names=domains or [], table_rows=config.table_rows, texts=config.texts)
    for row in iter_jsonl(path):
        whole.add(row)
        if last is not None and row["step"] <= last:
            continue
        values = {key: value for key, value in row.items() if value is not None}
        media = {key: view(key, value) for key, value in values.items() if is_media(value) and row["step"] in pictured}
        run.log({key: view(key, value) for key, value in values.items() if not is_media(value)})
        if media:
            run.log({"step": row["step"], **media})
        sent += 1
    close_run(run, whole)
    return sent


def run_id(run_dir: Path) -> str:
    """The id of the W&B run of a run folder: drawn at the first start, and kept there."""
    path = run_dir / ID_FILE
    try:
        if kept := path.read_text().strip():
            return kept
    except OSError:
        pass
    drawn = secrets.token_hex(6)
    try:
        path.write_text(f"{drawn}\n")
    except OSError as error:
        log.debug("the id of the W&B run cannot be kept: %s", error)
    return drawn


def has_key() -> bool:
    """Whether an API key is in the environment, or in netrc for the server that is used."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import wandb

    host = urlparse(os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
