"""The ranks `make train` starts: `python -m launch._ranks CONFIG [key=value ...]` prints their number.

One for each GPU, or two on a CPU; fewer where a configuration cannot be cut that way: the quickstart's batch of 16 is
for 1, 2 or 4. One that fits no number is left to the training to complain of.
"""

import sys

import torch

from configs.loader import load_run_config
from configs.schema import RunConfig
from trainer.errors import ConfigError


def largest_fit(config: RunConfig, most: int) -> int:
    """The largest number of ranks up to `most` that the configuration takes; `most` if there is none."""
    return next((number for number in range(most, 0, -1) if not config.problems(number)), most)


def main(argv: list[str]) -> int:
    """Print the number; returns the exit code."""
    most = torch.cuda.device_count() or 2
    try:
        fit = largest_fit(load_run_config(argv[0], argv[1:], world_size=None), most)
    except ConfigError:
        fit = most  # the training says it, with what to do
    sys.stdout.write(f"{fit}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
