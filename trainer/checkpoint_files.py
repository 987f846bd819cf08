"""Files of checkpoints: written durably, hashed, verified, and the newest intact folder found."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from trainer import ranks
from trainer.errors import CheckpointError
from trainer.train_state import TrainState

log = logging.getLogger("evenkeel")

MANIFEST = "MANIFEST.json"
WEIGHTS = "model.safetensors"
STATES = "state.json"


def published(root: Path) -> list[Path]:
    """The folders under `root` that bear the name of a checkpoint, oldest first; not one that somebody has renamed."""
    return sorted((p for p in root.glob("step-*") if p.is_dir() and p.name[5:].isdecimal()), key=step_of)


def newest_intact(root: Path, *, last_step: int | None = None) -> Path | None:
    """The newest checkpoint under `root` whose files all have their recorded hash; None if there is none at all.

    `last_step`: look at none of a later step. All ranks verify a share each and agree. Raises CheckpointError if
    checkpoints exist but none is intact.
    """
    folders = [folder for folder in published(root) if last_step is None or step_of(folder) <= last_step]
    candidates = ranks.broadcast_object([folder.name for folder in reversed(folders)])
    rejected = []
    for name in candidates:
        complaints = [line for part in ranks.gather_objects(problems_of(root / name)) for line in part]
        if not complaints:
            return root / name
        rejected.append(f"{root / name}: {complaints[0]}")
        if ranks.is_main():
            log.warning("checkpoint rejected: %s", rejected[-1])
    if rejected:
        raise CheckpointError(f"no intact checkpoint: {'; '.join(rejected)}. Restore one, or train in a new run_dir")
    return None


def problems_of(folder: Path, *, read: bool = True) -> list[str]:
    """What is wrong with a checkpoint; all ranks together look at every file, and at every byte if `read`."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        for name in sorted(files)[ranks.rank() :: ranks.world_size()]:
            path, expected = folder / name, files[name]
            if not path.is_file():
                return [f"{name} is missing"]
            if path.stat().st_size != expected["size"]:
                return [f"{name} has {path.stat().st_size} bytes, the manifest says {expected['size']}"]
            if read and fsync_and_hash(path)["sha256"] != expected["sha256"]:
                return [f"{name} does not have the hash in the manifest"]
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        return [f"{MANIFEST} is unreadable ({type(error).__name__})"]
    return []


def read_train_state(run_dir: Path) -> TrainState | None:
    """Counters and mixtures of a run's newest checkpoint whose files are all there; None if it has none.

    For one process that looks on: it reads one small file, and of the others names and sizes. Raises CheckpointError if
    there are checkpoints but none of them will do.
    """
    rejected = []
    for folder in reversed(published(run_dir / "checkpoints")):
        found = _train_state(folder)
        if isinstance(found, TrainState):
            return found
        rejected.append(f"{folder}: {found}")
        log.warning("checkpoint rejected: %s; looking at the one before it", rejected[-1])
    if rejected:
        raise CheckpointError(f"no intact checkpoint: {'; '.join(rejected)}. Restore one")
    return None


def _train_state(folder: Path) -> TrainState | str:
    """The state in a checkpoint, or what is wrong there."""
    problems = problems_of(folder, read=False)
    if problems:
        return problems[0]
    try:
        text = (folder / STATES).read_bytes()
        expected = json.loads((folder / MANIFEST).read_text())["files"][STATES]["sha256"]
        if hashlib.sha256(text).hexdigest() != expected:
            return f"{STATES} does not have the hash in the manifest"
        return TrainState(**json.loads(text)["trainer"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{STATES} cannot be read ({type(error).__name__}: {error})"


def step_of(folder: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(folder.name.removeprefix("step-"))


def size_of(folder: Path) -> int:
    """Bytes of all files in a checkpoint."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def fsync_and_hash(path: Path) -> dict[str, Any]:
    """Have a file on the disk; its entry in the manifest."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_durably(path: Path, text: str) -> None:
    """Write a small file and have it on the disk."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
