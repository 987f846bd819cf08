"""Checkpoints that are whole or do not exist.

    checkpoints/step-00000200/
        MANIFEST.json          written last: step, layout, configuration, size and sha256 of every other file
        optimizer.json         where which part of Adam's numbers is (trainer/optimizer_state.py)
        state.json, hooks.safetensors, model.safetensors, rng-*.safetensors, optimizer-*.safetensors
                               what each rank has written (trainer/snapshot.py)

Saving: the loop waits while each rank copies its share to the host, and goes on while a thread writes it. Everything
goes to `tmp-step-N`, is fsynced and hashed by all ranks, then the manifest is written and the folder renamed. A folder
called `step-N` is therefore complete, whenever the job died. One save is under way at a time; the last one of a job is
waited for, and the failure of any reaches every rank at the same step. Loading: the newest folder whose files all have
their recorded hash wins, and all ranks agree on it before any is opened; if there are folders but none is intact the
run ends instead of silently starting again.

Nothing in a checkpoint says how the run was cut: it goes on with another number of ranks, ZeRO stage or expert
parallelism. Nothing in it is pickled. The run folder must be on storage that all nodes share.
"""

import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from trainer import ranks
from trainer.checkpoint_files import (
    MANIFEST,
    WEIGHTS,
    fsync_and_hash,
    fsync_folder,
    newest_intact,
    published,
    size_of,
    step_of,
    write_durably,
)
from trainer.differences import differences
from trainer.divergence import refuse_divergence
from trainer.engine import Engine
from trainer.errors import CheckpointError, NumericError, StorageError
from trainer.hooks import HookList
from trainer.model_weights import load_weights
from trainer.optimizer_state import INDEX, read_fragments, write_index
from trainer.snapshot import Share, Snapshot, read_states, restore_rng
from trainer.train_state import TrainState

log = logging.getLogger("evenkeel")

FORMAT = 2
_SEED_STRIDE = 1_000_003
_SPARE_FACTOR = 1.2  # free space asked for, relative to the previous checkpoint
_LAST_CHANCE_S = 3.0  # for a save under way when the run ends with an error


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and how many to keep."""

    every: int = 500
    """Steps between checkpoints; 0 saves only at the end and on preemption."""
    keep: int = 2
    """Newest checkpoints kept; older ones are deleted after a newer one is complete. One that was found damaged does
    not count: it goes when a newer one is complete."""
    asynchronous: bool = True
    """Train on while a thread writes. Costs host memory for a copy of weights and optimizer until it is written."""

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        found = []
        if self.every < 0:
            found.append(f"every: {self.every} is negative; use 0 to save only at the end")
        if self.keep < 1:
            found.append(f"keep: {self.keep} would delete the only checkpoint; use at least 1")
        return found


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(
        self, run_dir: Path, config: CheckpointConfig, identity: Mapping[str, Any], *, timeout_s: float
    ) -> None:
        """`identity`: flat facts that a checkpoint must share with the run that loads it.

        `timeout_s`: how long a rank that has written its files waits for the others. A collective: every rank calls it.
        """
        self._root = run_dir / "checkpoints"
        self._config = config
        self._identity = dict(identity)
        self._channel = ranks.side_channel(timeout_s)
        self._saving: Future[None] | None = None
        self._rejected: set[int] = set()  # steps whose folders are not intact

    def save(self, engine: Engine, hooks: HookList, state: TrainState, *, wait: bool = False) -> None:
        """Save this moment; every rank calls it. Returns when the copy is made, or with `wait` when it is published.

        Raises StorageError if this save cannot begin or the one before has failed, NumericError if ranks differ.
        """
        self.finish()
        began = time.perf_counter()
        self.refuse_divergence(engine, hooks, state)
        staging = self._root / f"tmp-step-{state.step:08d}"
        _on_main(lambda: self._open_staging(staging))
        snapshot = Snapshot.take(engine, hooks, state)
        self._saving = Future()
        arguments = (snapshot, staging, began, time.perf_counter() - began, self._saving)
        if wait or not self._config.asynchronous:
            self._write(*arguments)
            self.finish()
        else:
            # A daemon: after an error nothing may wait for ranks that are gone.
            threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True).start()

    def refuse_divergence(self, engine: Engine, hooks: HookList, state: TrainState) -> None:
        """Raise NumericError on every rank if what they train is no longer the same; every rank calls it."""
        plan = hashlib.sha256(json.dumps(state.plan).encode()).hexdigest()
        digests = {"hook state": hooks.digest(), "the mixture of the data": plan}
        try:
            refuse_divergence(engine.module, digests, state.step)
        except NumericError:
            self.finish()  # what is still being written is from before
            raise

    def finish(self) -> None:
        """Wait for the save under way and raise what went wrong in it, the same on every rank."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """The run has ended well: wait for the save under way and free what it needed; every rank calls it."""
        self.finish()
        ranks.close_side_channel(self._channel)
        self._channel = None

    def leave(self) -> None:
        """The run ends with an error: let a save that is almost done end, and wait for nobody who may be gone."""
        if self._saving is not None:
            wait_for([self._saving], timeout=_LAST_CHANCE_S)

    @property
    def has_failed(self) -> bool:
        """Whether the save under way has come to an end that `finish` will raise."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def newest_before(self, step: int) -> Path | None:
        """The newest intact checkpoint of `step` or before, None if there is none; every rank calls it.

        Raises CheckpointError if there are such checkpoints but none is intact.
        """
        self.finish()
        return newest_intact(self._root, last_step=step)

    def discard(self, first: int, last: int) -> None:
        """Delete the checkpoints between two steps, neither included: their weights turned out to be no good."""
        if ranks.is_main():
            for folder in published(self._root):
                if first < step_of(folder) < last:
                    shutil.rmtree(folder)
        ranks.barrier()

    def load_newest(self, engine: Engine, hooks: HookList) -> TrainState | None:
        """Restore the newest intact checkpoint into engine, hooks and generators; None if there is none at all.

        Raises CheckpointError if checkpoints exist but none is intact, or if the intact one is of another run.
        """
        folder = newest_intact(self._root)
        if folder is None:
            return None
        # All newer ones were looked at before it.
        self._rejected = {step for each in published(self._root) if (step := step_of(each)) > step_of(folder)}
        return self.load(folder, engine, hooks)

    def load(self, folder: Path, engine: Engine, hooks: HookList) -> TrainState:
        """Restore a verified checkpoint into engine, hooks and generators.

        Raises CheckpointError if it does not fit.
        """
        try:
            return self._load(folder, engine, hooks)
        except SafetensorError as error:
            raise CheckpointError(f"{folder}: a file is not what its name says ({error}); restore it") from error

    def _load(self, folder: Path, engine: Engine, hooks: HookList) -> TrainState:
        manifest = json.loads((folder / MANIFEST).read_text())
        self._refuse_foreign(folder, manifest)
        load_weights(engine.module, folder / WEIGHTS, partial(engine.whole, write=True))
        engine.state.clock = read_fragments(folder, engine.state.fragments())
        state, hook_states = read_states(folder)
        notes = hooks.load_state_dict(hook_states)
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
            restore_rng(folder, ranks.rank())
        else:
            torch.manual_seed(torch.initial_seed() + state.step * _SEED_STRIDE)
        return state

    def _refuse_foreign(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        if manifest.get("format") != FORMAT:
            raise CheckpointError(f"{folder}: format {manifest.get('format')}, this code reads format {FORMAT}")
        changed = differences(manifest["identity"], self._identity)
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
            previous = published(self._root)
            if previous:
                needed = int(_SPARE_FACTOR * size_of(previous[-1]))
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

    def _write(self, snapshot: Snapshot, staging: Path, began: float, held_s: float, saving: Future[None]) -> None:
        """Write, agree, publish: the part of a save that training does not wait for."""
        try:
            shares = ranks.gather_objects(snapshot.write(staging), self._channel)
            _on_main(lambda: self._publish(snapshot, staging, shares), self._channel)
            if ranks.is_main():
                took = time.perf_counter() - began
                log.info(
                    "checkpoint of step %d saved in %.1f s; it held training %.1f s", snapshot.state.step, took, held_s
                )
            saving.set_result(None)
        except BaseException as error:
            saving.set_exception(error)

    def _publish(self, snapshot: Snapshot, staging: Path, shares: Sequence[Share]) -> None:
        """Make the folder of all shares a checkpoint, or remove it and say why; then delete what is too old."""
        step = snapshot.state.step
        failed = [share.problem for share in shares if share.problem]
        try:
            if failed:
                raise OSError(failed[0])
            self._write_manifest(snapshot, staging, shares)
            target = self._root / f"step-{step:08d}"
            if target.exists():  # a rejected one of the same step
                shutil.rmtree(target)
            os.replace(staging, target)
            fsync_folder(self._root)
            self._rejected.discard(step)
            for old in self._outdated(step):
                shutil.rmtree(old)
        except OSError as error:
            free = shutil.disk_usage(self._root).free if self._root.exists() else 0
            shutil.rmtree(staging, ignore_errors=True)
            raise StorageError(
                f"{staging}: cannot write the checkpoint of step {step} ({error}); {free >> 20} MiB are free. "
                "Earlier checkpoints are intact: free space and start again to resume"
            ) from error

    def _outdated(self, newest: int) -> list[Path]:
        """Folders that may go now: of those up to step `newest`, just published, all but the last `keep` intact ones.

        A newer one can only be a rejected one that the run has not come to again. It stays until then: somebody may
        still want to restore it, and every start rejects it anew.
        """
        folders = [folder for folder in published(self._root) if step_of(folder) <= newest]
        intact = [folder for folder in folders if step_of(folder) not in self._rejected]
        return [folder for folder in folders if folder not in intact[-self._config.keep :]]

    def _write_manifest(self, snapshot: Snapshot, staging: Path, shares: Sequence[Share]) -> None:
        write_index(staging, [share.spans for share in shares], snapshot.sizes, snapshot.clock)
        files = {name: entry for share in shares for name, entry in share.files.items()}
        manifest = {
            "format": FORMAT,
            "step": snapshot.state.step,
            "ranks": len(shares),
            "identity": self._identity,
            "versions": {name: version(name) for name in ("torch", "deepspeed")},
            "files": files | {INDEX: fsync_and_hash(staging / INDEX)},
        }
        write_durably(staging / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
        fsync_folder(staging)


def _on_main(action: Callable[[], None], channel: torch.distributed.ProcessGroup | None = None) -> None:
    """Run `action` on rank 0; its failure is everybody's failure, so that nobody waits for a rank that gave up."""
    failure: StorageError | None = None
    if ranks.is_main():
        try:
            action()
        except StorageError as error:
            failure = error
    message = ranks.broadcast_object(None if failure is None else str(failure), channel)
    if message is not None:
        raise StorageError(message) from failure
