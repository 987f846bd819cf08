"""Checkpoints that are whole or do not exist.

    checkpoints/step-00000200/
        MANIFEST.json          written last: step, layout, configuration, size and sha256 of every other file
        state.json             the trainer's counters and the hooks' numbers
        hooks.safetensors      the hooks' tensors
        rng-00000.safetensors  the random state of each rank
        model.safetensors      the weights alone, in the model's precision, for evaluation and export
        optimizer.json, optimizer-00000.safetensors
                               Adam's numbers, parameter by parameter (trainer/optimizer_state.py)

Saving: everything goes to `tmp-step-N`, is fsynced and hashed by all ranks, then the manifest is written and the
folder renamed. A folder called `step-N` is therefore complete, whenever the job died. Loading: the newest folder
whose files all have their recorded hash wins, and all ranks agree on it before any is opened; if there are folders
but none is intact the run ends instead of silently starting again.

Nothing in a checkpoint says how the run was cut: it goes on with another number of ranks, ZeRO stage or expert
parallelism. Nothing in it is pickled. The run folder must be on storage that all nodes share.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from trainer import ranks
from trainer.divergence import refuse_divergence
from trainer.engine import Engine
from trainer.errors import CheckpointError, StorageError
from trainer.hooks import HookList, State
from trainer.model_weights import load_weights, whole_weights
from trainer.optimizer_state import INDEX, Spans, fragments_file, read_fragments, write_fragments, write_index

log = logging.getLogger("evenkeel")

FORMAT = 2
MANIFEST = "MANIFEST.json"
WEIGHTS = "model.safetensors"
_SEED_STRIDE = 1_000_003
_SPARE_FACTOR = 1.2  # free space asked for, relative to the previous checkpoint


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and how many to keep."""

    every: int = 500
    """Steps between checkpoints; 0 saves only at the end and on preemption."""
    keep: int = 2
    """Newest checkpoints kept; older ones are deleted after a newer one is complete."""

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        found = []
        if self.every < 0:
            found.append(f"every: {self.every} is negative; use 0 to save only at the end")
        if self.keep < 1:
            found.append(f"keep: {self.keep} would delete the only checkpoint; use at least 1")
        return found


@dataclass(kw_only=True)
class TrainState:
    """Everything the loop itself carries from step to step. The data cursor is `step`, into `plan`."""

    step: int = 0
    """Steps attempted."""
    applied_steps: int = 0
    """Steps the optimizer applied: the clock of every schedule."""
    tokens: int = 0
    """Target tokens seen, over all ranks."""
    samples: int = 0
    loss_ema: float | None = None
    skipped_in_a_row: int = 0
    plan: dict[str, Any] = field(default_factory=dict)
    """Mixtures trained on so far (trainer/data/plan.py), as of the checkpoint."""


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, run_dir: Path, config: CheckpointConfig, identity: Mapping[str, Any]) -> None:
        """`identity`: flat facts that a checkpoint must share with the run that loads it."""
        self._root = run_dir / "checkpoints"
        self._config = config
        self._identity = dict(identity)

    def save(self, engine: Engine, hooks: HookList, state: TrainState) -> Path:
        """Write a checkpoint of this moment; every rank calls it. Returns the published folder."""
        plan = hashlib.sha256(json.dumps(state.plan).encode()).hexdigest()
        refuse_divergence(engine.module, {"hook state": hooks.digest(), "the mixture of the data": plan}, state.step)
        target = self._root / f"step-{state.step:08d}"
        staging = self._root / f"tmp-step-{state.step:08d}"
        _on_main(lambda: self._open_staging(staging))
        weights = whole_weights(engine.module, engine.whole)
        shares = ranks.gather_objects(_write_share(staging, engine, hooks, state, weights))
        failed = [share.problem for share in shares if share.problem]
        _on_main(
            lambda: self._give_up(staging, state, failed) if failed else self._publish(staging, target, shares, state)
        )
        return target

    def load_newest(self, engine: Engine, hooks: HookList) -> TrainState | None:
        """Restore the newest intact checkpoint into engine, hooks and generators; None if there is none at all.

        Raises CheckpointError if checkpoints exist but none is intact, or if the intact one is of another run.
        """
        folder = newest_intact(self._root)
        if folder is None:
            return None
        try:
            return self._load(folder, engine, hooks)
        except SafetensorError as error:
            raise CheckpointError(f"{folder}: a file is not what its name says ({error}); restore it") from error

    def _load(self, folder: Path, engine: Engine, hooks: HookList) -> TrainState:
        manifest = json.loads((folder / MANIFEST).read_text())
        self._refuse_foreign(folder, manifest)
        load_weights(engine.module, folder / WEIGHTS, partial(engine.whole, write=True))
        engine.clock = read_fragments(folder, engine.fragments())
        saved = json.loads((folder / "state.json").read_text())
        notes = hooks.load_state_dict(_read_hook_states(folder, saved["hooks"]))
        if manifest["ranks"] != ranks.world_size():
            notes = [
                *notes,
                f"saved by {manifest['ranks']} ranks, resumed by {ranks.world_size()}: the order of the data stays, "
                "dropout and jitter draw anew",
            ]
        if ranks.is_main():
            for note in notes:
                log.warning(note)
        # Last of all: whatever loading draws must not count.
        if manifest["ranks"] == ranks.world_size():
            _restore_rng(safetensors.torch.load_file(folder / f"rng-{ranks.rank():05d}.safetensors"))
        else:
            torch.manual_seed(torch.initial_seed() + saved["trainer"]["step"] * _SEED_STRIDE)
        return TrainState(**saved["trainer"])

    def _refuse_foreign(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        if manifest.get("format") != FORMAT:
            raise CheckpointError(f"{folder}: format {manifest.get('format')}, this code reads format {FORMAT}")
        saved = manifest["identity"]
        keys = sorted(saved.keys() | self._identity.keys())
        changed = [
            f"{key}: {saved.get(key, 'absent')} -> {self._identity.get(key, 'absent')}"
            for key in keys
            if saved.get(key) != self._identity.get(key)
        ]
        if changed:
            raise CheckpointError(
                f"{folder} belongs to another run ({'; '.join(changed)}): restore these settings, or set a new run_dir"
            )

    def _open_staging(self, staging: Path) -> None:
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            for leftover in self._root.glob("tmp-step-*"):
                shutil.rmtree(leftover)
            staging.mkdir()
            previous = sorted(self._root.glob("step-*"))
            if previous:
                needed = int(_SPARE_FACTOR * sum(p.stat().st_size for p in previous[-1].rglob("*") if p.is_file()))
                free = shutil.disk_usage(self._root).free
                if free < needed:
                    staging.rmdir()
                    raise StorageError(
                        f"{self._root}: a checkpoint needs {needed / 2**20:.0f} MiB, {free >> 20} MiB are free. "
                        "Earlier checkpoints are intact: free space and start again to resume"
                    )
        except OSError as error:
            raise StorageError(
                f"{error.filename}: {error.strerror}; make checkpoints writable and start again"
            ) from error

    def _give_up(self, staging: Path, state: TrainState, problems: list[str]) -> None:
        free = shutil.disk_usage(self._root).free if self._root.exists() else 0
        shutil.rmtree(staging, ignore_errors=True)
        raise StorageError(
            f"{staging}: cannot write the checkpoint of step {state.step} ({problems[0]}); {free >> 20} MiB are free. "
            "Earlier checkpoints are intact: free space and start again to resume"
        )

    def _publish(self, staging: Path, target: Path, shares: "list[_Share]", state: TrainState) -> None:
        files = {name: entry for share in shares for name, entry in share.files.items()}
        manifest = {
            "format": FORMAT,
            "step": state.step,
            "ranks": len(shares),
            "identity": self._identity,
            "versions": {name: version(name) for name in ("torch", "deepspeed")},
            "files": files,
        }
        try:
            write_index(staging, [share.spans for share in shares], shares[0].sizes, shares[0].clock)
            files[INDEX] = _fsync_and_hash(staging / INDEX)
            _write_durably(staging / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
            _fsync_folder(staging)
            if target.exists():  # a rejected one of the same step
                shutil.rmtree(target)
            os.replace(staging, target)
            _fsync_folder(self._root)
            for old in sorted(self._root.glob("step-*"))[: -self._config.keep]:
                shutil.rmtree(old)
        except OSError as error:
            raise StorageError(
                f"{error.filename or staging}: {error.strerror}; earlier checkpoints are intact"
            ) from error


@dataclass(frozen=True, kw_only=True)
class _Share:
    """What one rank has written, or why it could not."""

    files: dict[str, Any]
    spans: Spans
    sizes: dict[str, int]
    clock: float
    problem: str = ""


def _write_share(
    staging: Path, engine: Engine, hooks: HookList, state: TrainState, weights: Mapping[str, Tensor]
) -> _Share:
    """Write this rank's files; a failure is told, not raised, so that all ranks can give up together."""
    rank, size = ranks.rank(), ranks.world_size()
    share = _Share(files={}, spans={}, sizes=engine.parameter_sizes(), clock=engine.clock)
    replicated = engine.config.zero_stage == 0
    fragments = (f.share(rank, size) if replicated else f for f in engine.fragments())
    try:
        spans = write_fragments(staging, rank, fragments)
        written = [staging / fragments_file(rank), staging / f"rng-{rank:05d}.safetensors"]
        safetensors.torch.save_file(_rng_state(), written[-1])
        if rank == 0:
            safetensors.torch.save_file(dict(weights), staging / WEIGHTS)
            written += [staging / WEIGHTS, *_write_states(staging, hooks, state)]
        files = {path.name: _fsync_and_hash(path) for path in written}
    except (OSError, SafetensorError) as error:
        return dataclasses.replace(share, problem=f"rank {rank}: {error}")
    return dataclasses.replace(share, files=files, spans=spans)


def read_train_state(run_dir: Path) -> TrainState | None:
    """Counters and mixtures of a run's newest complete checkpoint; None if it has none. Reads one small file, alone.

    Raises CheckpointError if that file does not have the hash in the manifest.
    """
    folders = sorted((path for path in (run_dir / "checkpoints").glob("step-*") if path.is_dir()), reverse=True)
    if not folders:
        return None
    path = folders[0] / "state.json"
    try:
        expected = json.loads((folders[0] / MANIFEST).read_text())["files"][path.name]["sha256"]
        text = path.read_bytes()
        if hashlib.sha256(text).hexdigest() == expected:
            return TrainState(**json.loads(text)["trainer"])
        problem = "does not have the hash in the manifest"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"cannot be read ({type(error).__name__}: {error})"
    raise CheckpointError(f"{path}: {problem}; restore it, or remove the folder to use the checkpoint before")


def newest_intact(root: Path) -> Path | None:
    """The newest checkpoint under `root` whose files all have their recorded hash; None if there is none at all.

    All ranks verify a share each and agree. Raises CheckpointError if checkpoints exist but none is intact.
    """
    candidates = ranks.broadcast_object(sorted((p.name for p in root.glob("step-*") if p.is_dir()), reverse=True))
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


def _on_main(action: Callable[[], None]) -> None:
    """Run `action` on rank 0; its failure is everybody's failure, so that nobody waits for a rank that gave up."""
    failure: StorageError | None = None
    if ranks.is_main():
        try:
            action()
        except StorageError as error:
            failure = error
    message = ranks.broadcast_object(None if failure is None else str(failure))
    if message is not None:
        raise StorageError(message) from failure


def _own_share(paths: list[Path]) -> list[Path]:
    return paths[ranks.rank() :: ranks.world_size()]


def _fsync_and_hash(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def problems_of(folder: Path, *, read: bool = True) -> list[str]:
    """What is wrong with a checkpoint; all ranks together look at every file, and at every byte if `read`."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        for name in _own_share(sorted(files)):
            path, expected = folder / name, files[name]
            if not path.is_file():
                return [f"{name} is missing"]
            if path.stat().st_size != expected["size"]:
                return [f"{name} has {path.stat().st_size} bytes, the manifest says {expected['size']}"]
            if read and _fsync_and_hash(path)["sha256"] != expected["sha256"]:
                return [f"{name} does not have the hash in the manifest"]
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        return [f"{MANIFEST} is unreadable ({type(error).__name__})"]
    return []


def _write_states(folder: Path, hooks: HookList, state: TrainState) -> list[Path]:
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for name, (hook_version, hook_state) in hooks.state_dict().items():
        plain = {key: value for key, value in hook_state.items() if not isinstance(value, Tensor)}
        numbers[name] = {"version": hook_version, "values": plain}
        tensors |= {
            f"{name}/{k}": v.detach().cpu().contiguous() for k, v in hook_state.items() if isinstance(v, Tensor)
        }
    paths = [folder / "hooks.safetensors", folder / "state.json"]
    safetensors.torch.save_file(tensors, paths[0])
    paths[1].write_text(json.dumps({"trainer": asdict(state), "hooks": numbers}, indent=1))
    return paths


def _read_hook_states(folder: Path, numbers: Mapping[str, Any]) -> dict[str, tuple[int, State]]:
    states: dict[str, tuple[int, State]] = {
        name: (entry["version"], dict(entry["values"])) for name, entry in numbers.items()
    }
    for path, tensor in safetensors.torch.load_file(folder / "hooks.safetensors").items():
        name, _, key = path.partition("/")
        states[name][1][key] = tensor
    return states


def _rng_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state(ranks.device())
    return state


def _restore_rng(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"], ranks.device())


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
