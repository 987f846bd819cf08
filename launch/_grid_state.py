"""The folder of a grid: what its runs are (grid.json), how far they are (state.json), and who may change that.

A run that has begun keeps the settings it began with: a grid file that says otherwise is refused, run by run.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, get_args

from configs.grid_loader import Grid, GridRun
from configs.loader import load_run_config, to_dict, to_yaml
from configs.schema import RunConfig
from configs.typed import flat
from launch._folder_lock import folder_holder, lock_folder
from launch._replace_file import replace_file
from trainer.differences import differences
from trainer.errors import CheckpointError, ConfigError, StorageError

FORMAT = 1
GRID, STATE, CONFIG, METRICS, OUTPUT = "grid.json", "state.json", "config.yaml", "metrics.jsonl", "output.txt"

Status = Literal["waiting", "running", "done", "failed", "stopped"]


@dataclass
class RunState:
    """How far one run is."""

    status: Status = "waiting"
    attempts: int = 0
    """How often it was started."""
    exit_code: int | None = None
    """Of the last start that ended."""
    reason: str = ""
    """Why it failed or was stopped, in one line."""
    seconds: float = 0.0
    """Time it has run, over all starts."""


class GridFolder:
    """Opens the folder of a grid for one `launch.ablate`, and keeps its state on disk."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.path = grid.folder
        self.states: dict[str, RunState] = {}
        self._lock: IO[str] | None = None

    def __enter__(self) -> "GridFolder":
        """Raises CheckpointError if another process runs the grid, ConfigError if runs have begun with other settings,
        StorageError if the folder cannot be written."""
        if (self.path / METRICS).exists():
            raise ConfigError(f"{self.path} is the folder of a run; give the grid another name")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = lock_folder(self.path)
        except OSError as error:
            raise _storage_error(error, self.path) from error
        if isinstance(lock, str):
            raise CheckpointError(f"{self.path} is in use by {lock}; stop it or set another folder")
        self._lock = lock
        try:
            states = read_states(self.path)
            self.states = {run.name: _at_rest(run, states.get(run.name, RunState())) for run in self.grid.runs}
            problems = [line for run in self.grid.runs for line in self._changed(run)]
            if problems:
                raise ConfigError(*problems)
            self._write_runs()
            self.save()
        except BaseException:
            lock.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.close()

    def save(self) -> None:
        """Write the states."""
        write_json(self.path / STATE, {name: asdict(state) for name, state in self.states.items()})

    def _changed(self, run: GridRun) -> list[str]:
        if not has_begun(run):
            return []
        try:
            before = load_run_config(run.folder / CONFIG, world_size=None)
        except ConfigError as error:
            return [
                f"{run.folder}: has begun with a configuration that cannot be read ({error.problems[0]}); delete it"
            ]
        changes = _differences(before, run.config)
        if not changes:
            return []
        return [
            f"{run.folder}: has begun with other settings ({'; '.join(changes)}); restore them, delete the folder to "
            "run it anew, or give the grid another name"
        ]

    def _write_runs(self) -> None:
        grid = self.grid
        plan = {
            "format": FORMAT,
            "name": grid.name,
            "config": str(grid.base),
            "baseline": grid.config.baseline or None,
            "axes": grid.axes(),
            "runs": [
                {"folder": run.name, "variant": run.variant, "seed": run.seed, "settings": run.settings}
                for run in grid.runs
            ],
        }
        for run in grid.runs:
            _replace(run.folder / CONFIG, to_yaml(run.config))
        write_json(self.path / GRID, plan)


def read_states(folder: Path) -> dict[str, RunState]:
    """The states of a grid's runs by folder; empty if there are none yet.

    Raises CheckpointError if the file is not one of ours.
    """
    path = folder / STATE
    if not path.exists():
        return {}
    try:
        found = {name: RunState(**fields) for name, fields in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: is no state of a grid ({error}); delete it: finished runs are recognised"
        ) from error
    bad = next((name for name, state in found.items() if state.status not in get_args(Status)), None)
    if bad is not None:
        raise CheckpointError(f"{path}: {bad} has status '{found[bad].status}'; delete the file")
    return found


def has_begun(run: GridRun) -> bool:
    """Whether the run has left anything that its settings explain."""
    return (run.folder / METRICS).exists() or (run.folder / "checkpoints").exists()


def observed(run: GridRun) -> Status:
    """How far a run is by its own folder alone: for runs that something else started, such as Slurm."""
    if folder_holder(run.folder):
        return "running"
    last = run.folder / "checkpoints" / f"step-{run.config.train.steps:08d}"
    return "done" if last.exists() else "waiting"


def write_json(path: Path, value: Mapping[str, Any] | list[Any]) -> None:
    """Replace a file at once, or not at all. Raises StorageError."""
    _replace(path, json.dumps(value, indent=1) + "\n")


def _replace(path: Path, text: str) -> None:
    try:
        replace_file(path, text)
    except OSError as error:
        raise _storage_error(error, path) from error


def _at_rest(run: GridRun, state: RunState) -> RunState:
    """A state as a new start finds it: what was running was interrupted, what failed gets another chance."""
    if state.status in ("running", "failed"):
        state.status, state.reason = "waiting", ""
    if state.status in ("done", "stopped") and not has_begun(run):
        return RunState()  # somebody deleted its folder
    if state.status == "waiting" and observed(run) == "done":
        state.status, state.exit_code = "done", 0
    return state


def _differences(before: RunConfig, now: RunConfig) -> list[str]:
    found = differences(flat(to_dict(before)), flat(to_dict(now)))
    return found[:4] + ([f"and {len(found) - 4} more"] if len(found) > 4 else [])


def _storage_error(error: OSError, path: Path) -> StorageError:
    return StorageError(f"{error.filename or path}: {error.strerror}; free space or make it writable, then start again")
