"""What every command shares: one line for a user's mistake, and the exit code that goes with it."""

import errno
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from trainer.errors import EvenkeelError, PeerLostError, StorageError

EXIT_CODES = "EVENKEEL_EXIT_CODES"
"""Variable with the folder in which launch.torchrun wants to find how each rank ended: a file named after each."""

_ROOT = Path(__file__).parents[1]
_STORAGE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE}
# These are bugs of ours unless the user named the place.
_PLACE_ERRNOS = {errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
# What all ranks have to say rank 0 says. A launcher ends it as soon as one of the others has left, so they wait.
_RANK_0_SPEAKS_S = 3.0
# gloo reports a lost peer as a plain RuntimeError; these are the openings of its messages.
_PEER_LOST_SIGNS = ("gloo", "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "NCCL")


def classify(error: BaseException) -> EvenkeelError | None:
    """The error as one of ours if the user, the disk or a peer caused it; None if it looks like a bug of ours."""
    if isinstance(error, EvenkeelError):
        return error
    if isinstance(error, OSError) and error.errno in _STORAGE_ERRNOS:
        where = f" {error.filename}" if error.filename else ""
        return StorageError(
            f"storage:{where}: {error.strerror}; free space or make the path writable, then start again"
        )
    name = type(error).__name__
    if name in {"DistNetworkError", "DistStoreError", "DistBackendError"}:
        address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        return PeerLostError(f"process group at {address}: {_first_line(error)}; choose a free port or start all ranks")
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _PEER_LOST_SIGNS):
        return PeerLostError(
            f"another rank is gone or silent: {_first_line(error)}; this one was in {_place(error)}; look at its log, "
            "start again"
        )
    return None


def misplaced(error: BaseException, argv: list[str]) -> StorageError | None:
    """The error as one of ours if it is about a place that the command line names, or one above or below it."""
    if not isinstance(error, OSError) or error.errno not in _PLACE_ERRNOS or not isinstance(error.filename, str):
        return None
    where = Path(error.filename)
    values = [value for word in argv for _, is_setting, value in [word.partition("=")] if is_setting]
    for given in map(Path, [*argv, *values]):
        is_above = where.name != "" and where in given.parents
        is_below = given.name != "" and given in where.parents
        if where == given or is_above or is_below:
            return StorageError(f"{where}: {error.strerror}; name another place")
    return None


def run_command(main: Callable[[list[str]], int], argv: list[str] | None = None) -> int:
    """Run `main` and turn errors into one line on stderr and an exit code; a bug keeps its traceback (exit 1)."""
    code = _run(main, sys.argv[1:] if argv is None else argv)
    if EXIT_CODES in os.environ and "RANK" in os.environ:
        (Path(os.environ[EXIT_CODES]) / os.environ["RANK"]).write_text(str(code))
    return code


def _run(main: Callable[[list[str]], int], argv: list[str]) -> int:
    try:
        return main(argv)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        known = classify(error) or misplaced(error, argv)
        if known is None:
            raise
        rank = os.environ.get("RANK", "0")
        # One rank of each node says what all raise: nodes may have been started with different files or overrides.
        if os.environ.get("LOCAL_RANK", "0") == "0" or not known.is_everywhere:
            prefix = f"error (rank {rank}): " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "error: "
            for line in str(known).splitlines():
                sys.stderr.write(f"{prefix}{line}\n")
            logging.getLogger("evenkeel").debug("failed", exc_info=error)
        else:
            time.sleep(_RANK_0_SPEAKS_S)
        return known.exit_code


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _place(error: BaseException) -> str:
    """Where in our own code an error came up: what a rank was doing when it waited in vain."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(_ROOT)]
    if not own:
        return "the libraries"
    return f"{Path(own[-1].filename).relative_to(_ROOT)}:{own[-1].lineno} ({own[-1].name})"
