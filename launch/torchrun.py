"""`torchrun` with our exit codes: the same arguments, but a worker's exit code reaches the caller.

Plain `torchrun` starts the same training; it just ends with exit code 1 and a stack of its own whatever the
worker's code was. A scheduler that must tell "wrong config" (2) from "preempted and saved" (75) uses this.
`--max-restarts N` starts all ranks again, up to N times, when one fails; they resume from the newest checkpoint.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from launch._cli import EXIT_CODES, run_command
from trainer.errors import PeerLostError


def main(argv: list[str]) -> int:
    """Run torch.distributed.run on `argv`; return 0 or the exit code of the first worker that failed."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments = torchrun.parse_args(argv)
    if arguments.max_restarts:
        # Restarted ranks must not find the addresses of the dead ones: the agents agree on a new store for each start.
        # By default they keep one for all starts, and gloo then dials ports where nobody listens any more.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with tempfile.TemporaryDirectory(prefix="evenkeel-") as folder:
        os.environ[EXIT_CODES] = folder
        try:
            torchrun.run(arguments)
        except ChildFailedError as error:
            return _cause([failure.exitcode for failure in error.failures.values()])
        except SignalException as error:
            # The agent has passed the signal on and waited for its workers, but does not say how they ended: they do.
            codes = [int(path.read_text()) for path in Path(folder).iterdir()]
            return _cause(codes) if any(codes) else 128 + error.sigval
    return 0


def _cause(codes: Sequence[int]) -> int:
    # Workers that lost a peer fail with 5, often before the agent sees the one that caused it: prefer the cause.
    cause = next((code for code in codes if code > 0 and code != PeerLostError.exit_code), None)
    return cause if cause is not None else PeerLostError.exit_code


if __name__ == "__main__":
    sys.exit(run_command(main))
