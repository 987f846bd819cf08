"""`launch.train` of which rank 1 freezes when the group has started."""

import os
import signal
import sys

import launch.train
import trainer.process_group
from launch._cli import run_command
from trainer import ranks


def _freeze(*arguments: object) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


if __name__ == "__main__":
    if ranks.rank() == 1:
        trainer.process_group._roll_call = _freeze  # type: ignore[assignment]
    sys.exit(run_command(launch.train.main))
