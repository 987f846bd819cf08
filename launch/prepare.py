"""Turn text into a tokenizer and indexed shards: `python -m launch.prepare configs/quickstart.yaml [key=value ...]`.

Reads the `data:` section of the config: one source (data.source) or a mixture of them (data.domains; see
configs/mixtures/). The default, `local_python`, is text that is on every machine with Python. All usable cores
tokenize. A preparation that was stopped, by whatever means, goes on where it was; preparing twice does nothing.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from launch._cli import run_command
from launch._console import terminal

_LINE_EVERY_S = 10.0


def main(argv: list[str]) -> int:
    """Prepare the corpus of a config; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file, for instance configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for instance data.source=my/texts")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that tokenize (default: one a usable core)")
    arguments = parser.parse_intermixed_args(argv)

    # Not at the top: workers import this module again, and these would bring them torch and its seconds.
    from configs.loader import load_run_config
    from trainer.data.config import MORE_HELDOUT
    from trainer.data.pool import usable_cores
    from trainer.data.prepare import prepare
    from trainer.errors import ConfigError

    workers = usable_cores() if arguments.workers is None else arguments.workers
    if workers < 1:
        raise ConfigError(f"--workers: {workers} must be at least 1")
    config = load_run_config(arguments.config, arguments.overrides, world_size=None)  # text is the same for any ranks
    console = terminal()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a log has room for whole numbers
    begin = time.monotonic()
    with _shown(console) as view:
        manifest, is_new = prepare(config.data, workers=workers, progress=view.show)
    console.print(_kept(manifest))
    if not any(counts["heldout"]["documents"] for counts in manifest["domains"].values()):
        console.print(f"warning: no document is held out; {MORE_HELDOUT}", highlight=False, soft_wrap=True)
    if manifest["dropped"]:
        console.print(_dropped(manifest))
    for problem in manifest["bad_documents"]:
        console.print(f"skipped: {problem}", highlight=False, soft_wrap=True)
    seconds = time.monotonic() - begin
    console.print(
        f"prepared in {seconds:.1f} s{view.throughput(workers)}: {config.data.path}"
        if is_new
        else f"already prepared: {config.data.path}",
        soft_wrap=True,
    )
    return 0


class _View:
    """Stages and bytes as they come: a bar on a terminal, elsewhere a line for each stage and every ten seconds."""

    def __init__(self, console: Console, bars: Progress | None) -> None:
        self._console = console
        self._bars = bars
        self._task: TaskID | None = None
        self._stage = ""
        self._begin = self._last_line = self._tokenizing_s = 0.0
        self._text_bytes = self._tokens = 0

    def show(self, status: Any) -> None:
        """Take note of a `trainer.data.tokenizing.Status`."""
        now = time.monotonic()
        is_new = status.stage != self._stage
        if is_new:
            self._stage, self._begin, self._last_line = status.stage, now, now
        if status.tokens:
            self._text_bytes, self._tokens, self._tokenizing_s = status.text_bytes, status.tokens, now - self._begin
        if self._bars is not None:
            if is_new:
                if self._task is not None:
                    self._bars.update(self._task, visible=False)
                self._task = self._bars.add_task(status.stage, total=status.total or None, rate="")
            assert self._task is not None
            self._bars.update(self._task, completed=status.done, rate=self._rate() if status.tokens else "")
        elif is_new or now - self._last_line >= _LINE_EVERY_S:
            share = f" {status.done / status.total:.0%}" if status.total and not is_new else ""
            rate = self._rate() if status.tokens else ""
            self._console.print(f"{status.stage}{share}{rate} ...", highlight=False, soft_wrap=True)
            self._last_line = now

    def throughput(self, workers: int) -> str:
        """What was tokenized, and how fast, in words; nothing if nothing was."""
        if not self._tokens:
            return ""
        return (
            f"; tokenized {self._text_bytes / 1e6:.1f} MB to {self._tokens / 1e6:.2f} M tokens"
            f"{self._rate()} with {workers} worker{'s'[: workers - 1]}"
        )

    def _rate(self) -> str:
        if not self._tokens or self._tokenizing_s <= 0:
            return ""
        megabytes, tokens = self._text_bytes / self._tokenizing_s / 1e6, self._tokens / self._tokenizing_s / 1e6
        return f" at {megabytes:.1f} MB/s, {tokens:.2f} M tokens/s"


@contextmanager
def _shown(console: Console) -> Iterator[_View]:
    if not console.is_terminal:
        yield _View(console, None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, console=console, transient=True) as bars:
        yield _View(console, bars)


def _kept(manifest: dict[str, Any]) -> Table:
    table = Table(title=f"vocabulary {manifest['tokenizer']['vocab_size']}")
    table.add_column("domain", no_wrap=True)
    for title in ("documents", "tokens", "held-out documents", "held-out tokens", "bytes/token"):
        table.add_column(title, justify="right")
    for name, counts in manifest["domains"].items():
        train, heldout = counts["train"], counts["heldout"]
        bytes_per_token = counts["bytes"] / max(train["tokens"] + heldout["tokens"], 1)
        cells = (train["documents"], train["tokens"], heldout["documents"], heldout["tokens"])
        table.add_row(name, *(f"{cell:,}" for cell in cells), f"{bytes_per_token:.2f}")
    return table


def _dropped(manifest: dict[str, Any]) -> Table:
    """Documents left out, by domain and by the option or rule that did it."""
    dropped: dict[str, dict[str, int]] = manifest["dropped"]
    reasons = sorted({reason for counts in dropped.values() for reason in counts})
    table = Table(title="documents dropped")
    table.add_column("domain", no_wrap=True)
    for reason in reasons:
        table.add_column(reason, justify="right")
    for name, counts in dropped.items():
        table.add_row(name, *(f"{counts.get(reason, 0):,}" for reason in reasons))
    return table


if __name__ == "__main__":
    sys.exit(run_command(main))
