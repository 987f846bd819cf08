"""What a rank can say of itself and measure in a moment, for trainer/health.py. Judges nothing.

Facts are plain strings: ranks whose code differs must still be able to read each other's. No probe draws a random
number, so a run with health checks is bit for bit the run without.

Shape letters: W ranks.
"""

import hashlib
import importlib.metadata
import platform
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer import ranks
from trainer.errors import PeerLostError

_PACKAGES = ("trainer", "moe", "reweighting", "configs", "launch")
_REPEATS = 9  # a median of nine shrugs off four interruptions


def facts(device: torch.device) -> dict[str, str]:
    """What must be the same on every rank, by what it is."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": importlib.metadata.version("deepspeed"),
        "code": code_digest(),
    } | ({"nccl": ".".join(map(str, torch.cuda.nccl.version()))} if device.type == "cuda" else {})


def accelerator(device: torch.device) -> str:
    """Name of what this rank computes on; of a CPU the instruction set, which decides its rounding and its speed."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU with {torch.backends.cpu.get_cpu_capability()}"


def code_digest() -> str:
    """Twelve hexadecimal digits of a hash over the sources of this package, hooks from elsewhere not included."""
    root = Path(__file__).resolve().parents[1]
    sha = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((root / package).rglob("*")):
            if path.suffix in (".py", ".cpp"):
                sha.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()[:12]


def matmul_seconds(device: torch.device) -> float:
    """Median time of one fixed matrix product: 0.27 GFLOP in fp32 on a CPU, 137 GFLOP in bf16 on a GPU."""
    on_gpu = device.type == "cuda"
    size, dtype = (4096, torch.bfloat16) if on_gpu else (512, torch.float32)
    left = torch.full((size, size), 0.5, dtype=dtype, device=device)
    return _median_seconds(lambda: left @ left, device)


def bandwidths(device: torch.device) -> dict[str, float]:
    """Bus bandwidth in GB/s of an all-reduce and an all-to-all over all ranks; empty for one rank.

    Bytes that the busiest link carries over the time it took: 2 (W - 1) / W of the tensor for an all-reduce by a ring,
    (W - 1) / W for an all-to-all. Tensors are small (4 MiB on CPUs, 64 MiB on GPUs), so these are lower bounds.
    """
    world = ranks.world_size()
    if world == 1:
        return {}
    count = (64 if device.type == "cuda" else 4) * 2**18 // world * world  # float32, in W equal parts
    sent, received = torch.ones(count, device=device), torch.empty(count, device=device)
    reduce_s = _median_seconds(lambda: dist.all_reduce(received.copy_(sent)), device, repeats=3)
    exchange_s = _median_seconds(lambda: dist.all_to_all_single(received, sent), device, repeats=3)
    moved = 4 * count * (world - 1) / world / 1e9
    return {"all_reduce_gb_s": 2 * moved / reduce_s, "all_to_all_gb_s": moved / exchange_s}


def links_hold(device: torch.device) -> None:
    """Every rank receives from every other the number it is owed. Raises PeerLostError if one is wrong."""
    world = ranks.world_size()
    if world == 1:
        return
    sent = torch.arange(world, device=device) + world * ranks.rank()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    for peer, number in enumerate(received.tolist()):
        if number != world * peer + ranks.rank():
            raise PeerLostError(
                f"health: rank {ranks.rank()} ({socket.gethostname()}) received {number} from rank {peer}, which sent "
                f"{world * peer + ranks.rank()}: the link between their nodes, or its driver, alters data"
            )


def clock() -> float:
    """This rank's wall clock at a moment that is the same for all ranks, within what a barrier takes."""
    ranks.barrier()
    return time.time()


def _median_seconds(work: Callable[[], Any], device: torch.device, repeats: int = _REPEATS) -> float:
    def timed() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    timed()  # the first use sets up connections and chooses kernels
    return statistics.median(timed() for _ in range(repeats))
