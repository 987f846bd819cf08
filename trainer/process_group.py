"""Start a process group, stop it, end a process that had one. NCCL where there is a GPU for each rank, gloo on CPUs.

One process without torchrun gets a group of one on an in-memory store, so that no port is needed.
"""

import atexit
import ctypes
import os
import signal
import sys
import threading
import time
import warnings
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from trainer import ranks
from trainer.errors import PeerLostError
from trainer.stale_locks import wait_for_extension_lock


def start_process_group(timeout_s: float) -> None:
    """Join the group that torchrun described in the environment, and hand it to DeepSpeed.

    `timeout_s`: how long a collective waits for a silent peer before this rank gives up. Raises PeerLostError for one.
    """
    _die_with_launcher()
    device = ranks.device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        wait_for_extension_lock()
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    _use_for_later_groups(timeout)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed insists on a launcher's variable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        from trainer.deepspeed_door import adopt_process_group

        adopt_process_group()
    _roll_call(timeout_s)


def _roll_call(timeout_s: float) -> None:
    """Wait for every rank, one by one, so that a silent one can be named; a collective only says that there is one.

    Raises PeerLostError on rank 0. The others go on, and notice at the next collective that rank 0 is gone.
    """
    if ranks.world_size() == 1:
        return
    store = dist.distributed_c10d._get_default_store()
    store.set(f"evenkeel/roll-call/{ranks.rank()}", "here")
    if not ranks.is_main():
        return
    deadline = time.monotonic() + timeout_s
    missing = []
    for rank in range(ranks.world_size()):
        left = max(deadline - time.monotonic(), 0.001)
        try:
            store.wait([f"evenkeel/roll-call/{rank}"], timedelta(seconds=left))
        except RuntimeError:  # torch's DistStoreError: the key did not come in time
            missing.append(str(rank))
    if missing:
        raise PeerLostError(
            f"process group: rank {', '.join(missing)} of {ranks.world_size()} joined but does not answer within "
            f"{timeout_s:g} s; look at its log and its node"
        )


def _use_for_later_groups(timeout: timedelta) -> None:
    """Give the groups that DeepSpeed makes our timeout too: it asks for none, and would wait half an hour for a rank
    that died meanwhile."""
    from torch.distributed import distributed_c10d

    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout


def _die_with_launcher() -> None:
    """Let the kernel kill this rank when torchrun's agent is killed.

    The agent starts ranks in sessions of their own, so what kills it does not reach them: they would train on, and keep
    the run folder from the job that is started next. Only Linux has this.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)


def stop_process_group() -> None:
    """Leave the group. Only after success: after an error other ranks may never come."""
    if ranks.is_distributed():
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End a process that has had a process group, with this exit code and no other; where `sys.exit` would stand.

    A thread of gloo may be the last to hold a tensor of the last collective. Letting go of it takes the interpreter's
    lock, and a thread that asks for the lock of an interpreter being torn down ends the process with SIGABRT, after all
    work was done (pytorch issue 190489; torch up to 2.13). So there is no tearing down here, only what comes before it:
    threads are joined, exit handlers run, what was printed is flushed. The standard library ends its forks so, too.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
