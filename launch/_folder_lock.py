"""A lock on a folder that a dead process does not hold."""

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

_FILE = ".lock"


def lock_folder(folder: Path) -> IO[str] | str:
    """The open lock file of `folder`, which holds the lock until it is closed; or who else holds it.

    Raises OSError if the file cannot be written.
    """
    lock = (folder / _FILE).open("a+")
    for is_last in (False, True):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if is_last:
                with lock:
                    lock.seek(0)
                    return lock.read().strip()
            time.sleep(0.2)  # somebody may only be looking (folder_holder)
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock


def folder_holder(folder: Path) -> str:
    """Who holds the lock of `folder`; empty if nobody does. Leaves the lock as it is."""
    try:
        with (folder / _FILE).open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return lock.read().strip() or "another process"
    except FileNotFoundError:
        pass
    return ""
