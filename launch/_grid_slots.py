"""Places for runs on this machine: cores and GPUs that no two runs share, and processes that do not outlive ablate."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from trainer.errors import ConfigError

_PR_SET_PDEATHSIG = 1
# What another launcher may have left for a process of its own.
_NOT_INHERITED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Slot:
    """Where one run at a time may run."""

    cpus: tuple[int, ...]
    """Cores, by the system's numbers; empty where the system cannot pin."""
    gpus: tuple[str, ...]
    """Entries of CUDA_VISIBLE_DEVICES; empty without GPUs."""
    threads: int
    """Threads of each rank, at most."""


def make_slots(parallel: int, *, ranks: int, num_runs: int, cpus: Sequence[int], gpus: Sequence[str]) -> list[Slot]:
    """Deal cores and GPUs to `parallel` slots for runs of `ranks` ranks; 0 makes as many as fit, with one a rank.

    Raises ConfigError if the slots would have to share.
    """
    devices, kind = (gpus, "GPUs") if gpus else (cpus, "cores")
    if gpus and len(gpus) < ranks:
        raise ConfigError(f"ranks: {ranks} ranks a run need as many GPUs, {len(gpus)} are visible")
    fit = max(1, len(devices) // ranks)
    count = parallel or min(fit, num_runs)
    if count > (fit if gpus else len(cpus)):
        each = ranks if gpus else 1
        raise ConfigError(
            f"--parallel: {count} runs with {each} of their own need {count * each} {kind}, there are {len(devices)}"
        )
    slots = []
    for number in range(count):
        own = tuple(cpus[len(cpus) * number // count : len(cpus) * (number + 1) // count]) or tuple(cpus)
        own_gpus = tuple(gpus[number * ranks : (number + 1) * ranks]) if gpus else ()
        slots.append(Slot(own, own_gpus, max(1, len(own) // ranks)))
    return slots


def usable_cpus() -> list[int]:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def usable_gpus() -> list[str]:
    """GPUs this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.cuda.is_available():
        return []
    return [name for name in given.split(",") if name] if given else [str(n) for n in range(torch.cuda.device_count())]


def start(argv: Sequence[str], output: Path | None, slot: Slot | None = None) -> "subprocess.Popen[bytes]":
    """Start a Python module with its output appended to a file (None: to ours), in its slot.

    It has a session of its own, so that Ctrl-C reaches us alone, and gets SIGTERM when we die, however we die: a run
    then saves and ends.
    """
    env = {key: value for key, value in os.environ.items() if key not in _NOT_INHERITED}
    if slot is not None:
        # Results depend, in their last bits, on the number of threads: a number that was set holds for any --parallel.
        given = env.get("OMP_NUM_THREADS", "")
        env["OMP_NUM_THREADS"] = str(min(slot.threads, int(given)) if given.isdigit() and int(given) else slot.threads)
        if slot.gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(slot.gpus)
    file = output.open("ab") if output is not None else None
    with file or nullcontext():
        return subprocess.Popen(
            [sys.executable, "-m", *argv],
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT if file else None, env=env,
            start_new_session=True, preexec_fn=_preparation(slot),
        )  # fmt: skip


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all it has started: torchrun's workers are in sessions of their own."""
    try:
        process = psutil.Process(pid)
        family = [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return
    for each in family:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue


def _preparation(slot: Slot | None) -> Callable[[], None]:
    """What the child does before it becomes the command."""
    parent = os.getpid()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    cpus = slot.cpus if slot is not None and hasattr(os, "sched_setaffinity") else ()

    def prepare() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(1)  # it died before the line above
        if cpus:
            os.sched_setaffinity(0, cpus)

    return prepare
