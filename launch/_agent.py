"""The agent of `launch.torchrun`: torch's, which starts the ranks of a node and restarts them, but knows when not to.

torch's agent restarts ranks after any exit code but 0. Codes 2, 3, 4 and 6 would only come again, and 75 is what a run
that was asked to stop ends with: after one of these nothing is restarted, and the job ends with it, on every node. Each
agent hears from its own ranks. That is enough for 75, on which all ranks agree; any other code it puts into the
rendezvous' store, where the agents whose ranks only lost a peer, or still wait for one, find it.
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.rendezvous import RendezvousError

from launch._cli import EXIT_CODES
from trainer.errors import PREEMPTED_EXIT_CODE, CheckpointError, ConfigError, NumericError, StorageError

_FINAL = {error.exit_code for error in (ConfigError, CheckpointError, NumericError, StorageError)} | {
    PREEMPTED_EXIT_CODE
}
_CODE, _HEARD = "evenkeel/exit-code", "evenkeel/heard"
_HEARD_WITHIN_S = 5.0  # that the node of the store waits for the others, which could not read there once it is gone


class JobOver(Exception):
    """Ranks of this node or another ended with a code after which nothing is started again."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the job is over: exit code {code}")
        self.code = code


class Agent(LocalElasticAgent):
    """One node's agent. `run` raises JobOver where torch's would restart ranks, or give up, after a final code."""

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        for said in Path(os.environ[EXIT_CODES]).iterdir():
            said.unlink()  # by ranks of an earlier start
        return super()._start_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state is WorkerState.HEALTHY:
            code = self._told()
        elif result.state in (WorkerState.FAILED, WorkerState.UNHEALTHY):
            ended = [failure.exitcode for failure in result.failures.values()]
            code = final([*ended, *reported()])
            if code is None:
                # The first to go may only have lost the one with the cause, which is still on its way out.
                self._stop_workers(worker_group)
                code = final(reported()) or self._told()
        else:
            code = None
        if code is not None:
            self._end(code)
        return result

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        try:
            super()._rendezvous(worker_group)
        except RendezvousError:
            code = self._told()  # by the agent that closed it
            if code is None:
                raise
            self._end(code)

    def _told(self) -> int | None:
        """What another agent has said that the job ends with."""
        store: Any = self._worker_group.store
        try:
            return int(store.get(_CODE)) if store is not None and store.check([_CODE]) else None
        except RuntimeError:  # the node of the store is gone
            return None

    def _end(self, code: int) -> NoReturn:
        group: Any = self._worker_group
        agreed = code == PREEMPTED_EXIT_CODE
        with suppress(RuntimeError, RendezvousError):  # the node of the store is gone, or others do not answer
            if not agreed:
                group.store.set(_CODE, str(code))
                group.store.set(f"{_HEARD}/{group.group_rank}", "")
                group.spec.rdzv_handler.set_closed()  # nobody need wait there for the ranks of this node
            self._stop_workers(group)
            if not agreed:
                all_heard = [f"{_HEARD}/{rank}" for rank in range(group.group_world_size)]
                group.store.wait(all_heard, timedelta(seconds=_HEARD_WITHIN_S))
        raise JobOver(code)


def reported() -> list[int]:
    """The codes that ranks of this node have said they end with since they were last started, in the order they did."""
    files = sorted(Path(os.environ[EXIT_CODES]).iterdir(), key=lambda path: path.stat().st_mtime_ns)
    return [int(text) for path in files if (text := path.read_text())]


def final(codes: Iterable[int]) -> int | None:
    """The first of `codes` after which nothing is started again, if there is one."""
    return next((code for code in codes if code in _FINAL), None)
