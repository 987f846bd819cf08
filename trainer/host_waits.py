"""The places of a step where the host may wait for the accelerator, and no others.

`torch.cuda.set_sync_debug_mode("error")` turns every wait of a step into an error, but for those declared here; under
"warn" these are counted with the others.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_ERROR = 2  # what torch.cuda.get_sync_debug_mode calls "error"


@contextmanager
def host_may_wait(device: torch.device) -> Iterator[None]:
    """What is done inside waits for `device` on purpose."""
    if device.type != "cuda" or torch.cuda.get_sync_debug_mode() != _ERROR:
        yield
        return
    torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("error")
