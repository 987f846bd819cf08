"""Who we are among the ranks, and the few collectives that hooks and the loop need.

Every function works without a process group too (one process, no torchrun): collectives are then the
identity. That is what lets the plain single-process reference and the hooks' unit tests run the same code.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

Reduction = Literal["sum", "max", "min"]
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


def is_distributed() -> bool:
    """True once the process group exists."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Global rank; 0 without a process group (torchrun's RANK before it exists)."""
    return dist.get_rank() if is_distributed() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of ranks; 1 without a process group (torchrun's WORLD_SIZE before it exists)."""
    return dist.get_world_size() if is_distributed() else int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Rank within the node, as torchrun sets it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """True on the rank that writes logs and metrics."""
    return rank() == 0


def device() -> torch.device:
    """The accelerator of this rank, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def all_reduce_(tensor: Tensor, reduction: Reduction = "sum") -> Tensor:
    """Reduce `tensor` over all ranks in place and return it."""
    if is_distributed():
        dist.all_reduce(tensor, op=_OPS[reduction])
    return tensor


def start_all_reduce_(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin to sum `tensor` over all ranks in place; the returned function waits for that and returns it.

    On CUDA it lets the current stream wait, not the host. Until then the tensor belongs to the collective.
    """
    if not is_distributed():
        return lambda: tensor
    work = dist.all_reduce(tensor, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return tensor

    return finish


def all_gather(tensor: Tensor) -> Tensor:
    """Stack equal-shaped tensors of all ranks: [...] -> [W, ...]."""
    if not is_distributed():
        return tensor.unsqueeze(0)
    gathered = tensor.new_empty((world_size(), *tensor.shape))
    dist.all_gather_into_tensor(gathered, tensor.contiguous().unsqueeze(0))
    return gathered


def side_channel(timeout_s: float) -> dist.ProcessGroup | None:
    """A further group of all ranks, over the hosts' network, for a thread that talks while the loop computes.

    `timeout_s`: how long its collectives wait for a silent peer. A collective: every rank calls it.
    """
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if is_distributed() else None


def close_side_channel(group: dist.ProcessGroup | None) -> None:
    """Take the group down: while it exists its threads wake up a hundred times a second. Every rank calls it."""
    if group is not None:
        dist.destroy_process_group(group)


def broadcast_object(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Rank 0's `value` on every rank. Small control data only; the pickled bytes never leave the job."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank. Small control data only."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def barrier() -> None:
    """Wait until every rank is here."""
    if is_distributed():
        dist.barrier()
