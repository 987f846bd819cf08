"""Turn text into a tokenizer and indexed shards: `python -m launch.prepare configs/quickstart.yaml [key=value ...]`.

Reads the `data:` section of the config. The default source, `local_python`, is text that is on every machine with
Python; a jsonl, parquet or txt file, or a folder of them, is named by data.source. Preparing twice does nothing.
"""

import argparse
import sys

from rich.console import Console
from rich.table import Table

from configs.loader import load_run_config
from launch._cli import run_command
from trainer.data.prepare import Manifest, prepare


def main(argv: list[str]) -> int:
    """Prepare the corpus of a config; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file, for instance configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for instance data.source=my/texts")
    arguments = parser.parse_intermixed_args(argv)
    config = load_run_config(arguments.config, arguments.overrides)
    console = Console()
    manifest, is_new = prepare(config.data, progress=lambda line: console.print(f"{line} ..."))
    console.print(_table(manifest))
    console.print(f"{'prepared' if is_new else 'already prepared'}: {config.data.path}")
    return 0


def _table(manifest: Manifest) -> Table:
    table = Table(
        title=f"vocabulary {manifest['tokenizer']['vocab_size']}, {manifest['duplicates_dropped']} duplicates dropped"
    )
    table.add_column("domain")
    for title in ("documents", "tokens", "held-out documents", "held-out tokens", "bytes/token"):
        table.add_column(title, justify="right")
    for name, counts in manifest["domains"].items():
        train, heldout = counts["train"], counts["heldout"]
        bytes_per_token = counts["bytes"] / (train["tokens"] + heldout["tokens"])
        cells = (train["documents"], train["tokens"], heldout["documents"], heldout["tokens"])
        table.add_row(name, *(f"{cell:,}" for cell in cells), f"{bytes_per_token:.2f}")
    return table


if __name__ == "__main__":
    sys.exit(run_command(main))
