"""Build once, in one process, what DeepSpeed compiles on first use: `python -m launch.warmup`."""

import argparse
import sys
import time

from launch._cli import run_command


def main(argv: list[str]) -> int:
    """Start and stop a one-process group through DeepSpeed; the compiled extension stays in torch's cache."""
    argparse.ArgumentParser(prog="python -m launch.warmup", description=__doc__).parse_args(argv)
    from trainer.process_group import start_process_group, stop_process_group

    begin = time.monotonic()
    start_process_group(timeout_s=300)
    stop_process_group()
    sys.stdout.write(f"DeepSpeed is ready ({time.monotonic() - begin:.0f} s)\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
