"""Checkpoints of a run: `python -m launch.checkpoint ls RUN`, `python -m launch.checkpoint verify RUN`.

`ls` lists them; `verify` reads every byte and compares it with the hash in the manifest. If one is not whole the exit
code is 3. There is no `convert`, because there is nothing to convert: any number of ranks, ZeRO stage and expert
parallelism reads any checkpoint. For Hugging Face there is `python -m launch.export`.
"""

import argparse
import json
import sys
from pathlib import Path

from rich.table import Table

from launch._cli import run_command
from launch._console import terminal
from trainer.checkpoint_files import MANIFEST, problems_of, published, step_of
from trainer.errors import CheckpointError, ConfigError

_NO_CONVERT = (
    "convert: checkpoints need no conversion, they hold nothing of how the run was cut: start launch.train again in "
    "the same run folder with any number of ranks, engine.zero_stage and engine.expert_parallel_size; for Hugging Face "
    "use launch.export RUN --out FOLDER"
)


def main(argv: list[str]) -> int:
    """List or verify; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if argv[:1] == ["convert"]:  # whatever follows: those who look for it have their own options in mind
        raise ConfigError(_NO_CONVERT)
    parser.add_argument("action", choices=["ls", "verify"], help="list them, or read and check every byte")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--step", type=int, help="only the checkpoint of this step")
    arguments = parser.parse_intermixed_args(argv)
    folders = _folders(arguments.run, arguments.step)

    table = Table("step", "ranks", "files", "MiB", "state")
    broken = []
    for folder in folders:
        problems = problems_of(folder, read=arguments.action == "verify")
        broken += [f"{folder}: {problem}; training resumes from the newest whole one" for problem in problems]
        files = [path for path in folder.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        verdict = problems[0] if problems else "whole" if arguments.action == "verify" else "files are there"
        step = str(step_of(folder))
        table.add_row(step, _ranks(folder), str(len(files)), f"{size / 2**20:,.1f}", verdict)
    terminal().print(table)
    if broken:
        raise CheckpointError("\n".join(broken))
    return 0


def _folders(run: Path, step: int | None) -> list[Path]:
    if not run.is_dir():
        raise ConfigError(f"{run}: is not a run folder; give one, for instance runs/quickstart")
    found = published(run / "checkpoints")
    if step is not None:
        found = [folder for folder in found if folder.name == f"step-{step:08d}"]
    if not found:
        wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise CheckpointError(f"{run}: has no {wanted}; train it first, or look with `ls`")
    return found


def _ranks(folder: Path) -> str:
    try:
        return str(json.loads((folder / MANIFEST).read_text())["ranks"])
    except (OSError, ValueError, KeyError, TypeError):
        return "?"


if __name__ == "__main__":
    sys.exit(run_command(main))
