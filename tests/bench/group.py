"""The process group of a bench: one for the life of the process, because DeepSpeed keeps what it has made of it."""

import torch.distributed as dist

from trainer.process_group import start_process_group


def join_process_group() -> None:
    """Start the group of this one process, unless a family before has."""
    if not dist.is_initialized():
        start_process_group(60)
