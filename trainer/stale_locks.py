"""The lock that torch takes while it builds or loads a compiled extension, when the process that took it is gone.

A process that is killed with -9 at that moment leaves the lock file behind, and every later start on the machine would
wait for it for ever.
"""

import logging
import time
from pathlib import Path

log = logging.getLogger("evenkeel")

_SHM_OP = "deepspeed_shm_comm"  # what DeepSpeed builds for collectives on CPUs
_POLL_S = 0.1


def wait_for_extension_lock(*, patience_s: float = 300.0) -> None:
    """Wait while another process builds DeepSpeed's CPU extension; remove a lock that nobody has touched so long."""
    from torch.utils.cpp_extension import _get_build_directory

    lock = Path(_get_build_directory(_SHM_OP, verbose=False)) / "lock"
    touched, seen = 0.0, 0.0
    while True:
        try:
            latest = lock.stat().st_mtime
        except OSError:
            return
        if latest != touched:
            touched, seen = latest, time.monotonic()
        # The wall clock may have been set back since then: what this process has waited counts in any case.
        age_s = max(time.time() - touched, time.monotonic() - seen)
        if age_s > patience_s:
            log.warning("%s is %.0f s old: whoever took it is gone, so it is removed", lock, age_s)
            lock.unlink(missing_ok=True)
            return
        time.sleep(_POLL_S)
