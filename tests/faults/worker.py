"""`launch.train` with a fault in it: the environment's FAULT says what happens, where and when.

    FAULT = action@rank:step:phase [, action@rank:step:phase ...]        action = kill, sleep=3, scale=1000, ...

Phases: build, load, fetch, forward, loss, before_step, after_step, evaluate, save_start, save_write,
save_before_manifest, save_before_rename. `scale` multiplies the losses of the forward that begins, `clock` sets
the wall clock that Python sees so many seconds forward (or back). Each fault happens once in a process, and not again
after torchrun restarted it.
"""

import errno
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import launch.train
import trainer.checkpoint
import trainer.loop
import trainer.snapshot
from launch._cli import run_command
from moe.model import MoEDecoder
from trainer import ranks
from trainer.checkpoint import CheckpointStore
from trainer.data.loader import TrainLoader
from trainer.hooks import HookList


@dataclass
class Fault:
    """One thing that goes wrong."""

    action: str
    value: str
    rank: int
    step: int
    phase: str


@dataclass
class Here:
    """What an action can reach."""

    model: MoEDecoder | None = None
    step: int = 0
    root: Path = Path()
    scale: float = 1.0


HERE = Here()


def vanish() -> None:
    shutil.rmtree(HERE.root)


def io_error() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO), str(HERE.root))


def wandb_raises() -> None:
    import wandb

    def log(*args: Any, **kwargs: Any) -> None:
        raise BrokenPipeError("the service is gone")

    wandb.Run.log = log  # type: ignore[method-assign]


def boom() -> None:
    raise RuntimeError("a fault on purpose")


@torch.no_grad()
def alter_parameter() -> None:
    next(p for name, p in HERE.model.named_parameters() if name.endswith("norm.weight"))[0] += 1e-6


@torch.no_grad()
def alter_bias() -> None:
    HERE.model.moe_layers()[0].router.expert_bias_E[0] += 1e-6


def set_clock(seconds: float) -> None:
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + int(seconds * 1e9)


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


ACTIONS: dict[str, Callable[[], None]] = {
    "kill": send(signal.SIGKILL),
    "freeze": send(signal.SIGSTOP),
    "terminate": send(signal.SIGTERM),
    "interrupt": send(signal.SIGINT),
    "raise": boom,
    "vanish": vanish,
    "io_error": io_error,
    "wandb_raises": wandb_raises,
    "barrier": ranks.barrier,
    "alter_parameter": alter_parameter,
    "alter_bias": alter_bias,
}


def parse(text: str) -> list[Fault]:
    """The faults that FAULT asks for."""
    found = []
    for part in filter(None, text.split(",")):
        what, _, where = part.strip().partition("@")
        action, _, value = what.partition("=")
        rank, step, phase = where.split(":")
        assert action in ACTIONS or action in ("sleep", "scale", "clock"), action
        found.append(Fault(action, value, int(rank), int(step), phase))
    return found


FAULTS = [] if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" else parse(os.environ.get("FAULT", ""))


def at(phase: str, step: int | None = None) -> None:
    """This rank is in `phase` of a step, or of the current one: let happen what is due."""
    now = HERE.step if step is None else step
    for fault in [f for f in FAULTS if (f.rank, f.step, f.phase) == (ranks.rank(), now, phase)]:
        FAULTS.remove(fault)
        sys.stderr.write(f"fault: {fault.action} on rank {fault.rank} at step {fault.step} in {phase}\n")
        sys.stderr.flush()
        if fault.action == "sleep":
            time.sleep(float(fault.value))
        elif fault.action == "scale":
            HERE.scale = float(fault.value)
        elif fault.action == "clock":
            set_clock(float(fault.value))
        else:
            ACTIONS[fault.action]()


def announcing(phase: str, *, late: bool = False) -> Callable[[Any], Any]:
    """Wraps a function so that `phase` is announced before it is called, or after."""

    def make(original: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not late:
                at(phase)
            result = original(*args, **kwargs)
            if late:
                at(phase)
            return result

        return wrapped

    return make


def saving(phase: str, *, late: bool = False) -> Callable[[Any], Any]:
    """The same for what gets the folder of a save first: it is written while the loop is at later steps."""

    def make(original: Any) -> Any:
        def wrapped(folder: Path, *args: Any, **kwargs: Any) -> Any:
            step = int(folder.name.removeprefix("tmp-step-")) if folder.name.startswith("tmp-step-") else -1
            if not late:
                at(phase, step)
            result = original(folder, *args, **kwargs)
            if late:
                at(phase, step)
            return result

        return wrapped

    return make


def _batches(original: Any) -> Any:
    def batches(self: TrainLoader, start_step: int) -> Iterator[Any]:
        for number, batch in enumerate(original(self, start_step), start=start_step + 1):
            HERE.step = number
            at("fetch")
            yield batch

    return batches


def _forward(original: Any) -> Any:
    def forward(self: MoEDecoder, *args: Any, **kwargs: Any) -> Any:
        HERE.model = self
        if self.training and HERE.step:
            at("forward")
        output = original(self, *args, **kwargs)
        scale, HERE.scale = HERE.scale, 1.0
        if scale == 1.0:
            return output
        return output * scale if isinstance(output, torch.Tensor) else (output[0] * scale, *output[1:])

    return forward


def _store(original: Any) -> Any:
    def __init__(self: CheckpointStore, run_dir: Path, *args: Any, **kwargs: Any) -> None:
        original(self, run_dir, *args, **kwargs)
        HERE.root = run_dir / "checkpoints"

    return __init__


PATCHES: list[tuple[Any, str, Callable[[Any], Any]]] = [
    (launch.train, "build", announcing("build")),
    (trainer.checkpoint, "load_weights", announcing("load", late=True)),
    (TrainLoader, "batches", _batches),
    (MoEDecoder, "forward", _forward),
    (HookList, "on_losses", announcing("loss")),
    (HookList, "before_step", announcing("before_step")),
    (HookList, "after_step", announcing("after_step")),
    (trainer.loop, "evaluate", announcing("evaluate")),
    (CheckpointStore, "__init__", _store),
    (trainer.snapshot, "write_fragments", saving("save_start")),
    (trainer.snapshot, "write_fragments", saving("save_write", late=True)),
    (trainer.checkpoint, "write_index", saving("save_before_manifest")),
    (trainer.checkpoint, "fsync_folder", saving("save_before_rename", late=True)),
]


def install() -> None:
    """Put the phases in place."""
    for owner, name, make in PATCHES:
        setattr(owner, name, make(getattr(owner, name)))


if __name__ == "__main__":
    install()
    sys.exit(run_command(launch.train.main))
