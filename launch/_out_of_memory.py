"""What to change when memory runs out: one line in place of an allocator's page, and on CUDA a snapshot of it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from configs.schema import RunConfig
from trainer import ranks
from trainer.errors import OutOfMemoryError
from trainer.profiling import FOLDER

log = logging.getLogger("evenkeel")

_CPU_SIGNS = ("DefaultCPUAllocator", "can't allocate memory", "std::bad_alloc")


@contextmanager
def explained_out_of_memory(config: RunConfig, run_dir: Path) -> Iterator[None]:
    """Raises OutOfMemoryError with advice in place of what torch says. Nothing here waits for other ranks."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        written = _snapshot(run_dir) if torch.cuda.is_available() else ""
        asked = (str(error).splitlines() or ["no more memory"])[0].strip()
        raise OutOfMemoryError(
            f"out of memory: {asked[:200]}; {advice(config, ranks.world_size())}{written}"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator has given up: torch raises a class of its own on CUDA only."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _CPU_SIGNS)


def advice(config: RunConfig, world_size: int) -> str:
    """What would take less, the cheapest first; all of these keep the result."""
    train, model, engine = config.train, config.model, config.engine
    steps = []
    if train.accumulation == "deferred":
        steps.append("train.accumulation=auto (keeps only the graphs that fit)")
    if train.micro_batch_size > 1:
        steps.append(f"train.micro_batch_size={train.micro_batch_size // 2} (the same batch in more pieces)")
    eager = " with model.compile=false" * model.compile
    if model.activation_recompute == "none" and not model.compile:
        steps.append("model.activation_recompute=selective (activations a quarter to a half smaller, little more time)")
    if model.activation_recompute != "block":
        steps.append("model.activation_recompute=block (a quarter of the activations, about a third more time)")
    if world_size > 1 and engine.zero_stage < 2:
        steps.append("engine.zero_stage=2 (gradients and optimizer state shared by the ranks)")
    elif world_size > 1 and engine.zero_stage == 2 and engine.expert_parallel_size == 1:
        steps.append(f"engine.zero_stage=3{eager} (parameters shared too), or engine.expert_parallel_size above 1")
    if torch.cuda.is_available() and engine.zero_stage > 0 and not engine.offload_optimizer:
        steps.append("engine.offload_optimizer=true (Adam's numbers in the host's memory, slower steps)")
    if not steps:
        steps.append(
            f"more ranks, engine.sequence_parallel_size above 1{eager}, or a smaller model or train.sequence_length"
        )
    return "try, in this order: " + ", ".join(steps)


def _snapshot(run_dir: Path) -> str:
    path = run_dir / FOLDER / f"out-of-memory-rank{ranks.rank()}.pickle"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
    except (OSError, RuntimeError) as error:
        log.debug("no snapshot of memory", exc_info=error)
        return ""
    return f"; {path} shows what held it (https://pytorch.org/memory_viz)"
