"""Build once, in one process, what is compiled on this machine: `python -m launch.warmup`.

DeepSpeed compiles an extension on first use; the CPU experts have a C++ part, without which they run in plain torch.
"""

import argparse
import sys
import time

from launch._cli import run_command
from moe import native
from trainer.process_group import leave, start_process_group, stop_process_group


def main(argv: list[str]) -> int:
    """Start and stop a one-process group through DeepSpeed, and compile the experts; both stay in torch's cache."""
    argparse.ArgumentParser(prog="python -m launch.warmup", description=__doc__).parse_args(argv)
    begin = time.monotonic()
    start_process_group(timeout_s=300)
    stop_process_group()
    sys.stdout.write(f"DeepSpeed is ready ({time.monotonic() - begin:.0f} s)\n")
    begin = time.monotonic()
    try:
        native.build()
    except (OSError, RuntimeError) as error:
        sys.stderr.write(f"the CPU experts will run in plain torch, a little slower: {str(error).splitlines()[-1]}\n")
    else:
        sys.stdout.write(f"the CPU experts are compiled ({time.monotonic() - begin:.0f} s)\n")
    return 0


if __name__ == "__main__":
    leave(run_command(main))
