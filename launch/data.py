"""Look at what a run trains on: `python -m launch.data show|stats|audit RUN|CONFIG [key=value ...]`.

    show    training samples as text, with document borders and what is no target
    stats   tokens, lengths, compression, padding and epochs by domain, as a table and with --out as a page
    audit   proves that every row and document was, or will be, seen exactly as often as planned

A run folder stands for the run as it was: its phases and the weights that hooks set are read from its newest
checkpoint. A configuration stands for the run that it would start. Exit codes: 0 done, 2 config, 3 data or checkpoint,
or an audit that found a deviation.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from launch._audit import audit
from launch._cli import run_command
from launch._console import terminal
from launch._show import show
from launch._stats import stats
from launch._stream import open_stream
from trainer.errors import ConfigError

_MOST_SAMPLES = 1 << 40  # more than anybody trains; beyond 2^63 arrays cannot count


def main(argv: list[str]) -> int:
    """Run one of the three; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    shown = commands.add_parser("show", help="training samples as text")
    shown.add_argument(
        "--samples", metavar="A,B,C", help="numbers of samples; default: the first ones, or a run's next"
    )
    shown.add_argument("--domain", default="", help="only samples of this domain")
    shown.add_argument("--count", type=int, default=3, help="how many, without --samples (default 3)")

    described = commands.add_parser("stats", help="tokens, lengths, compression, padding and epochs by domain")
    described.add_argument("--out", type=Path, metavar="FILE", help="write a self-contained HTML page")

    audited = commands.add_parser("audit", help="count how often everything is seen")
    audited.add_argument("--samples", type=int, help="how many; default: those a run has trained, or will train")
    audited.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for CSV files (default: audit/ in a run folder)"
    )

    for command in (shown, described, audited):
        command.add_argument("target", metavar="RUN|CONFIG", help="run folder, or YAML file")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="with a YAML file")
    # parse_intermixed_args knows no subcommands: options may stand anywhere, what is left over is key=value.
    arguments, rest = parser.parse_known_args(argv)
    unknown = [each for each in rest if each.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    stream = open_stream(arguments.target, [*arguments.overrides, *rest])
    console = terminal()
    if arguments.command == "show":
        show(stream, console, samples=_numbers(arguments.samples), domain=arguments.domain, count=arguments.count)
        return 0
    if arguments.command == "stats":
        stats(stream, console, arguments.out)
        return 0
    if arguments.samples is not None and not 1 <= arguments.samples <= _MOST_SAMPLES:
        raise ConfigError(f"--samples: {arguments.samples} must be at least 1, and at most 2^40")
    return audit(stream, console, samples=arguments.samples, out=arguments.out)


def _numbers(text: str | None) -> Sequence[int] | None:
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--samples: '{text}' is not a list of numbers such as 0,17,4096") from None
    if min(numbers) < 0:
        raise ConfigError(f"--samples: {min(numbers)} is negative")
    if max(numbers) > _MOST_SAMPLES:
        raise ConfigError(f"--samples: {max(numbers)} is more than 2^40")
    return numbers


if __name__ == "__main__":
    sys.exit(run_command(main))
