"""Watch runs in the terminal: `python -m launch.watch RUN|GRID`.

Shows a running or finished run (losses, MaxVio, loads of the experts, domains, events, speed, time to go), or the runs
of a grid, a line each, and follows their files as they grow. It reads and never writes, so any number of people may
watch, on any machine that has the folder. Ctrl-C ends it. Where output is no terminal it prints
once and ends, as with --once.
"""

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live

from launch._cli import run_command
from launch._console import terminal
from launch._watch_grid import GridView
from launch._watch_run import RunView
from launch.report_sections._grid import is_grid
from trainer.errors import ConfigError

_REDRAW_LOOKS = 10


def main(argv: list[str]) -> int:
    """Show until told to stop; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.watch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="RUN|GRID", help="run folder, or the folder of a grid")
    parser.add_argument("--once", action="store_true", help="print what there is and end")
    parser.add_argument("--every", type=float, default=1.0, metavar="SECONDS", help="how often to look (default 1)")
    arguments = parser.parse_args(argv)
    if not arguments.every > 0:
        raise ConfigError(f"--every: {arguments.every:g} must be more than 0 seconds")
    if not arguments.folder.is_dir():
        raise ConfigError(f"{arguments.folder}: is no folder; name a run folder or the folder of a grid")
    view: RunView | GridView = GridView(arguments.folder) if is_grid(arguments.folder) else RunView(arguments.folder)
    view.poll()
    console = terminal()
    if arguments.once or not console.is_terminal:
        console.print(view.show(console.width, 1000))
        return 0
    _follow(view, console, arguments.every)
    return 0


def _follow(view: RunView | GridView, console: Console, every: float) -> None:
    """Draw again and again, on the terminal's other screen, until Ctrl-C; what was last seen stays on the first one."""
    size, looks = None, 0
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            changed = True
            while True:
                looks += 1
                # Without news too, now and then: time goes on. And at once when the terminal has another size.
                if changed or console.size != size or looks % _REDRAW_LOOKS == 0:
                    size = console.size
                    live.update(view.show(size.width, size.height), refresh=True)
                time.sleep(every)
                changed = view.poll()
    except KeyboardInterrupt:
        console.print(view.show(console.width, console.height))


if __name__ == "__main__":
    sys.exit(run_command(main))
