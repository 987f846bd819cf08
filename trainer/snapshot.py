"""A rank's share of a checkpoint: copied to the host while the loop waits, written to files while it goes on.

state.json             the trainer's counters and the hooks' numbers
hooks.safetensors      the hooks' tensors
rng-00000.safetensors  the random state of each rank
model.safetensors      the weights alone, in the model's precision, for evaluation and export
optimizer-00000.safetensors
                       Adam's numbers, parameter by parameter (trainer/optimizer_state.py)
"""

import dataclasses
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from trainer import ranks
from trainer.checkpoint_files import STATES, WEIGHTS, fsync_and_hash
from trainer.engine import Engine
from trainer.hooks import HookList, State
from trainer.model_weights import whole_weights
from trainer.optimizer_state import Fragment, Spans, fragments_file, write_fragments
from trainer.tensor_files import save_tensors
from trainer.train_state import TrainState

log = logging.getLogger("evenkeel")

_HOOKS = "hooks.safetensors"
_PAUSE_S = 1.0  # before the one retry: a network file system that hiccups needs a moment


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one rank has written, or why it could not."""

    files: dict[str, Any]
    """Size and hash of each file by name."""
    spans: Spans
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All a rank has to write, on the host and its own: nothing of it changes when training goes on."""

    rank: int
    state: TrainState
    fragments: list[Fragment]
    sizes: dict[str, int]
    """Elements of every parameter of the whole model."""
    clock: float
    """Steps Adam has taken."""
    rng: dict[str, Tensor]
    weights: dict[str, Tensor]
    """The whole model; empty on ranks other than 0, like the hooks' states, which are alike everywhere."""
    hooks: dict[str, tuple[int, State]]

    @classmethod
    def take(cls, engine: Engine, hooks: HookList, state: TrainState) -> "Snapshot":
        """Copy the share of this rank. A collective: every rank calls it."""
        rank, size = ranks.rank(), ranks.world_size()
        replicated = engine.config.zero_stage == 0
        fragments = (f.share(rank, size) if replicated else f for f in engine.state.fragments())
        return cls(
            rank=rank,
            state=dataclasses.replace(state),
            fragments=[fragment.on_host() for fragment in fragments if fragment.start < fragment.stop],
            sizes=engine.state.parameter_sizes(),
            clock=engine.state.clock,
            rng=_rng_state(),
            weights=whole_weights(engine.module, engine.whole, keep=rank == 0),
            hooks={name: (v, _copied(s)) for name, (v, s) in hooks.state_dict().items()} if rank == 0 else {},
        )

    def write(self, folder: Path) -> Share:
        """Write this rank's files; a failure is told, not raised, so that all ranks can give up together.

        What fails is tried once more: an input/output error of a network file system is often gone a moment later.
        """
        share = self._write(folder)
        if share.problem and folder.is_dir():
            log.warning("checkpoint of step %d: %s; trying once more", self.state.step, share.problem)
            time.sleep(_PAUSE_S)
            share = self._write(folder)
        return share

    def _write(self, folder: Path) -> Share:
        try:
            spans = write_fragments(folder, self.rank, self.fragments)
            rng = folder / rng_file(self.rank)
            save_tensors(self.rng, rng)
            written = [folder / fragments_file(self.rank), rng]
            if self.rank == 0:
                save_tensors(self.weights, folder / WEIGHTS)
                written += [folder / WEIGHTS, *self._write_states(folder)]
            return Share(files={path.name: fsync_and_hash(path) for path in written}, spans=spans)
        except (OSError, SafetensorError) as error:
            return Share(files={}, spans={}, problem=f"rank {self.rank}: {error}")

    def _write_states(self, folder: Path) -> list[Path]:
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, Any] = {}
        for name, (version, state) in self.hooks.items():
            plain = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
            numbers[name] = {"version": version, "values": plain}
            tensors |= {f"{name}/{key}": value for key, value in state.items() if isinstance(value, Tensor)}
        save_tensors(tensors, folder / _HOOKS)
        (folder / STATES).write_text(json.dumps({"trainer": asdict(self.state), "hooks": numbers}, indent=1))
        return [folder / _HOOKS, folder / STATES]


def rng_file(rank: int) -> str:
    """The file of a rank's random state."""
    return f"rng-{rank:05d}.safetensors"


def read_states(folder: Path) -> tuple[TrainState, dict[str, tuple[int, State]]]:
    """The trainer's counters and every hook's version and state, as `Snapshot.write` left them."""
    saved = json.loads((folder / STATES).read_text())
    hooks: dict[str, tuple[int, State]] = {
        name: (entry["version"], dict(entry["values"])) for name, entry in saved["hooks"].items()
    }
    for path, tensor in safetensors.torch.load_file(folder / _HOOKS).items():
        name, _, key = path.partition("/")
        hooks[name][1][key] = tensor
    return TrainState(**saved["trainer"]), hooks


def restore_rng(folder: Path, rank: int) -> None:
    """Set the generators of this process to what `rank` had."""
    state = safetensors.torch.load_file(folder / rng_file(rank))
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"], ranks.device())


def _rng_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state(ranks.device())
    return state


def _copied(state: Mapping[str, Any]) -> State:
    return {
        key: value.detach().to("cpu", copy=True).contiguous() if isinstance(value, Tensor) else value
        for key, value in state.items()
    }
