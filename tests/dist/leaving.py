"""Rank 0 leaves while a thread of gloo asks for the interpreter's lock, to let go of a tensor that nobody else holds.

With `sys.exit` instead of `leave` it dies of SIGABRT: "terminate called without an active exception" (torch 2.13).
"""

import atexit
import os
import sys
import time

import torch
import torch.distributed as dist

from trainer import ranks
from trainer.process_group import leave, start_process_group


class Last:
    """Gives the lock away while the interpreter is torn down, as some object always does."""

    sleep = staticmethod(time.sleep)  # by then the module's names are gone

    def __del__(self) -> None:
        self.sleep(0.5)


if __name__ == "__main__":
    start_process_group(60)
    if not ranks.is_main():
        time.sleep(1)
        os._exit(0)  # gloo's thread on rank 0 has waited for this rank: now it has an error, and is done with its tensor
    last = Last()
    dist.all_reduce(torch.ones(1 << 20), async_op=True)
    # Ending takes a moment in which this thread does not give the lock away. Here that moment is certain, and long.
    sys.setswitchinterval(60)
    until = time.monotonic() + 3
    while time.monotonic() < until:
        pass
    atexit.register(sys.stdout.write, "handled")
    sys.stdout.write("printed and ")
    leave(7)
