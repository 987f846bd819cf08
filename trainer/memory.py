"""How many micro-batches may keep their graphs until the weights are known: as many as fit into measured memory.

The first step keeps one graph, which the backward needs anyway, and measures what it takes; after that step, when
gradients and optimizer state exist, the free memory of the fullest rank says how many more fit. The result never
depends on it: graphs that are not kept are made again, from the same random state.
"""

import logging
import os
from typing import Literal

import psutil
import torch

from trainer import ranks

log = logging.getLogger("evenkeel")

_USABLE = 0.8  # of the free memory: allocators fragment, and other micro-batches may be larger


class GraphBudget:
    """Decides, alike on every rank, how many leading micro-batches of a step keep their graphs."""

    def __init__(
        self, mode: Literal["auto", "deferred", "two_pass"], num_micro_batches: int, device: torch.device
    ) -> None:
        self._num_micro_batches = num_micro_batches
        self._device = device
        self._before = self._graph_bytes = 0
        self.kept = {"auto": min(1, num_micro_batches), "deferred": num_micro_batches, "two_pass": 0}[mode]
        """Micro-batches that keep their graphs; the others are forwarded twice."""
        self._is_open = mode == "auto" and num_micro_batches > 1

    def before_forward(self) -> None:
        """The first forward of a step begins."""
        if self._is_open:
            self._before = _used_bytes(self._device)

    def after_forward(self) -> None:
        """That forward is done and its graph is alive."""
        if self._is_open:
            self._graph_bytes = max(self._graph_bytes, _used_bytes(self._device) - self._before)

    def settle(self) -> None:
        """A step has been applied: everything that stays is allocated now. Decides once; every rank calls it."""
        if not self._is_open:
            return
        self._is_open = False
        free = _free_bytes(self._device)
        more = int(_USABLE * free // max(self._graph_bytes, 1))
        agreed = ranks.all_reduce_(torch.tensor(min(more, self._num_micro_batches), device=self._device), "min")
        self.kept = min(self._num_micro_batches, 1 + int(agreed))
        log.info(
            "accumulation: %d of %d micro-batches keep their graphs (%.3f GiB each, %.1f GiB free), the others are "
            "forwarded twice",
            *(self.kept, self._num_micro_batches, self._graph_bytes / 2**30, free / 2**30),
        )


def _used_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def _free_bytes(device: torch.device) -> int:
    """What the largest step so far has left of this rank's memory: of the GPU, or its share of the node's RAM."""
    if device.type == "cuda":
        unused, _ = torch.cuda.mem_get_info(device)
        return unused + torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)
    return int(psutil.virtual_memory().available) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
