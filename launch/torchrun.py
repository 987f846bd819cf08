"""`torchrun` with our exit codes: the same arguments, but a worker's exit code reaches the caller.

Plain `torchrun` starts the same training; it just ends with exit code 1 and a stack of its own whatever the
worker's code was. A scheduler that must tell "wrong config" (2) from "preempted and saved" (75) uses this.
`--max-restarts N` starts all ranks again, up to N times, when one dies or loses a peer; they resume from the newest
checkpoint. After 2, 3, 4, 6 or 75 nothing is started again, and every node ends with that code (launch/_agent.py).
SIGUSR1, with which Slurm warns of a time limit, is passed on to the ranks too, which save and end with 75.
"""

import os
import sys
import tempfile
from collections.abc import Sequence

from launch._cli import EXIT_CODES, run_command
from trainer.errors import ConfigError, PeerLostError

_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def main(argv: list[str]) -> int:
    """Run torch.distributed.run on `argv`; return 0 or the exit code of the first worker that failed."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher import api

    from launch._agent import Agent, JobOver, final, reported

    api.LocalElasticAgent = Agent  # type: ignore[misc] # torch has no argument for it
    # Kubeflow and other launchers number nodes with these. They are not the rank of a worker, which torchrun sets.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    # First, so that the user's own choice comes later and wins.
    arguments = torchrun.parse_args([f"--signals-to-handle={_SIGNALS}", *argv])
    try:
        ranks_of_a_node = torchrun.config_from_args(arguments)[0].nproc_per_node
    except (ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError(f"torchrun: {error}") from None
    if ranks_of_a_node < 1:
        raise ConfigError(f"--nproc_per_node: {ranks_of_a_node} must be at least 1")
    if arguments.max_restarts:
        # Restarted ranks must not find the addresses of the dead ones: the agents agree on a new store for each start.
        # By default they keep one for all starts, and gloo then dials ports where nobody listens any more.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with tempfile.TemporaryDirectory(prefix="evenkeel-") as folder:
        os.environ[EXIT_CODES] = folder
        try:
            torchrun.run(arguments)
        except JobOver as over:
            return over.code
        except ChildFailedError as error:
            # The agent ends a worker that takes its time to leave, whose own code is then lost to it.
            return cause([*(failure.exitcode for failure in error.failures.values()), *reported()])
        except SignalException as error:
            # The agent has passed the signal on and waited for its workers, but does not say how they ended: they do.
            codes = reported()
            return cause(codes) if any(codes) else 128 + error.sigval
        except RendezvousError as error:
            code = final(reported())
            if code is not None:  # the node of the rendezvous ended before this one had seen its ranks do
                return code
            raise PeerLostError(
                f"rendezvous at {arguments.rdzv_endpoint}: {error} Is the first node up and reachable, and does every "
                "node name the same endpoint and id?"
            ) from error
        finally:
            del os.environ[EXIT_CODES]  # this process is no rank
    return 0


def cause(codes: Sequence[int]) -> int:
    """The exit code of a job whose parts ended with `codes`, of which at least one is not 0."""
    # Workers that lost a peer fail with 5, often before the agent sees the one that caused it: prefer the cause.
    found = next((code for code in codes if code > 0 and code != PeerLostError.exit_code), None)
    return found if found is not None else PeerLostError.exit_code


if __name__ == "__main__":
    sys.exit(run_command(main))
