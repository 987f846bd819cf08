"""The folder of a run: who may write to it, what is logged there, and what is shown of it."""

import logging
import logging.handlers
import socket
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from configs.loader import read_tree, to_dict, to_yaml
from configs.schema import RunConfig
from configs.typed import flat
from launch._console import terminal
from launch._folder_lock import lock_folder
from launch._replace_file import replace_file
from trainer import ranks
from trainer.differences import differences
from trainer.errors import CheckpointError, ConfigError, StorageError
from trainer.hooks import StopReason
from trainer.metrics import JsonlLog, iter_jsonl
from trainer.profiling import SlowRankWatch
from trainer.progress import ProgressDisplay
from trainer.run_summary import summarize, summary_table
from trainer.wandb_sink import WandbSink

log = logging.getLogger("evenkeel")

_LOG_BYTES = 16 << 20
_OLD_LOGS = 4  # files; older ones are deleted


class RunFolder:
    """Opens a run folder for one job: log file, and a lock that a dead job does not hold."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._lock: IO[str] | None = None

    def __enter__(self) -> "RunFolder":
        problem = ranks.broadcast_object(self._open() if ranks.is_main() else None)
        if problem is not None:
            kind, message = problem
            raise {"storage": StorageError, "taken": CheckpointError}[kind](message)
        start_logging(self._run_dir)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            log.debug("the run ended with an error", exc_info=error)
        if self._lock is not None:
            self._lock.close()

    def _open(self) -> tuple[str, str] | None:
        """What keeps this job from the folder, or None. Only rank 0 looks."""
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            lock = lock_folder(self._run_dir)
            if isinstance(lock, str):
                return ("taken", f"run_dir: {self._run_dir} is in use by {lock}; stop it or set another name")
            self._lock = lock
        except OSError as error:
            return ("storage", _not_writable(self._run_dir, error))
        return None


def take_config(run_dir: Path, config: RunConfig) -> None:
    """Write config.yaml and log what of it is new; every rank calls it, once the newest checkpoint has been loaded.

    Until then the file is of the start before: a start that is refused must not leave settings that no checkpoint has.
    Raises StorageError.
    """
    problem = ranks.broadcast_object(_take_config(run_dir, config) if ranks.is_main() else None)
    if problem is not None:
        raise StorageError(problem)


def _take_config(run_dir: Path, config: RunConfig) -> str | None:
    path = run_dir / "config.yaml"
    has_started = (run_dir / "metrics.jsonl").exists() or (run_dir / "checkpoints").exists()
    try:
        if has_started and path.exists():
            for line in differences(flat(read_tree(path)), flat(to_dict(config))):
                log.warning("config changed since the last start of this run: %s", line)
    except ConfigError as error:
        log.warning("config of the last start of this run is lost: %s", error)
    try:
        replace_file(path, to_yaml(config))
    except OSError as error:
        return _not_writable(path, error)
    return None


def _not_writable(path: Path, error: OSError) -> str:
    return f"run_dir: {error.filename or path}: {error.strerror}; make it writable or set another"


class RunReport:
    """Takes rows of metrics to the file, the screen and W&B. Does nothing on ranks other than 0."""

    def __init__(self, config: RunConfig, run_dir: Path, domain_names: Sequence[str], *, start_step: int) -> None:
        self._active = ranks.is_main()
        hosts = ranks.gather_objects(socket.gethostname())
        if not self._active:
            return
        self._slow_ranks = SlowRankWatch(config.profile.slow_rank_factor, hosts)
        self._file = JsonlLog(run_dir / "metrics.jsonl")
        if start_step:
            log.info("resumed from step %d", start_step)
            self._file.truncate_after(start_step)
        else:
            (run_dir / "metrics.jsonl").unlink(missing_ok=True)
        self._display = ProgressDisplay(config.train.steps, start_step)
        self._wandb = WandbSink(
            config.wandb,
            run_dir=run_dir,
            run_name=config.name,
            resolved_config=to_dict(config),
            domain_names=domain_names,
        )

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take finished rows."""
        if not self._active:
            return
        self._file.append(rows)
        for row in rows:
            if "loss" in row:
                self._display.show(row)
                if lagging := self._slow_ranks.look(row):
                    log.warning("%s", lagging)
                    rank = row["time/slowest_rank"]  # its host's name is for the log, which stays here
                    self._wandb.alert("slow rank", f"step {row['step']}: all others wait for rank {rank}")
            else:
                log.info("step %d held-out loss %.4f%s", row["step"], row["eval/loss"], _maxvio(row))
            self._wandb.log(row)

    def __enter__(self) -> "RunReport":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            self._display.close()
            self._wandb.close(error=error if isinstance(error, Exception) else None)


def start_logging(run_dir: Path) -> None:
    """Rank 0 logs to the screen and to log.txt (before it log.txt.1, ...); other ranks only warnings, to the screen."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    root = logging.getLogger("evenkeel")
    root.setLevel(logging.DEBUG)
    root.propagate = False
    form = logging.Formatter("%(asctime)s %(levelname)s " + f"[{ranks.rank()}] %(message)s", "%H:%M:%S")
    screen = logging.StreamHandler(sys.stderr)
    screen.setLevel(logging.INFO if ranks.is_main() else logging.WARNING)
    handlers: list[logging.Handler] = [screen]
    if ranks.is_main():
        handlers.append(
            logging.handlers.RotatingFileHandler(run_dir / "log.txt", maxBytes=_LOG_BYTES, backupCount=_OLD_LOGS)
        )
    for handler in handlers:
        handler.setFormatter(form)
    root.handlers = handlers


def print_summary(run_dir: Path, domain_names: Sequence[str], reason: StopReason) -> None:
    """The table a person wants to see when a run has ended, and where the rest is."""
    console = terminal()
    try:
        summary = summarize(iter_jsonl(run_dir / "metrics.jsonl"), domain_names)
    except ConfigError:
        summary = None
    if summary is not None:
        console.print(summary_table(summary))
    console.print(
        f"{reason}: results are in {run_dir} (report.html, metrics.jsonl, log.txt, checkpoints/)", highlight=False
    )


def _maxvio(row: Mapping[str, Any]) -> str:
    value = row.get("eval/maxvio_global")
    certified = " (balance certified)" if row.get("moe/certificate") else ""
    return "" if value is None else f" maxvio {value:.3f}{certified}"
