"""What there is to do about Weights & Biases beside a run.

    python -m launch.wandb sync runs/quickstart [runs/other ...]     send what the server does not have yet
    python -m launch.wandb workspace configs/quickstart.yaml --out panels.json [--save]

`sync` reads metrics.jsonl, the record of a run, so it does not matter whether the run was offline, lost its server or
was started several times; the W&B run is the one whose id lies in the run folder (wandb-id). `workspace` writes the
definition of the panels we look at; `--save` also creates them in the project. Project, entity and group are those of
the run or config.

The server is WANDB_BASE_URL, or W&B's own; the key WANDB_API_KEY, or what `wandb login` has stored.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from configs.loader import load_run_config, to_dict
from configs.schema import RunConfig
from launch._cli import run_command
from launch._wandb_workspace import definition, save, workspace
from trainer.errors import ConfigError, StorageError
from trainer.metrics import iter_jsonl
from trainer.wandb_sink import has_key, send_rows


def main(argv: list[str]) -> int:
    """Sync, or define a workspace; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.wandb", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    sync = commands.add_parser("sync", help="send what the server does not have yet")
    sync.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    sync.add_argument("--all", action="store_true", help="send every step, also those that are there already")
    panels = commands.add_parser("workspace", help="the panels of a project, as JSON or on the server")
    panels.add_argument("source", type=Path, metavar="CONFIG|RUN", help="YAML file or run folder")
    panels.add_argument("overrides", nargs="*", metavar="key=value", help="for instance wandb.entity=team")
    panels.add_argument(
        "--out", type=Path, default=Path("workspace.json"), help="file to write (default workspace.json)"
    )
    panels.add_argument("--save", action="store_true", help="also create it on the server")
    arguments = parser.parse_args(argv)
    if arguments.command == "sync":
        return _sync(arguments.runs, everything=arguments.all)
    return _workspace(_config_of(arguments.source, arguments.overrides), arguments.out, on_server=arguments.save)


def _sync(runs: list[Path], *, everything: bool) -> int:
    configs = [_config_of(run_dir, []) for run_dir in runs]
    recorded = [sum(1 for _ in iter_jsonl(run_dir / "metrics.jsonl")) for run_dir in runs]  # a damaged one is told now
    _require_key()
    for run_dir, config, total in zip(runs, configs, recorded, strict=True):
        wanted = dataclasses.replace(config.wandb, mode="online")
        sent = send_rows(
            wanted,
            run_dir=run_dir,
            run_name=config.name,
            resolved_config=to_dict(config),
            everything=everything,
        )
        sys.stdout.write(f"{run_dir}: {sent} of {total} rows sent to project {wanted.project}\n")
    return 0


def _workspace(config: RunConfig, out: Path, *, on_server: bool) -> int:
    entity, project = config.wandb.entity, config.wandb.project
    if on_server:
        _require_key()
        if not entity:
            raise ConfigError("wandb.entity: a workspace belongs to a user or team; add wandb.entity=NAME")
    space = workspace(entity or "ENTITY", project, group=config.wandb.group)
    try:
        out.write_text(definition(space))
    except OSError as error:
        raise StorageError(f"--out: {out}: {error.strerror}; choose another file") from error
    sys.stdout.write(f"{out}: {len(space.sections)} sections for project {project}\n")
    if on_server:
        try:
            sys.stdout.write(f"{save(space)}\n")
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise StorageError(f"W&B: cannot save the workspace: {reason}; {out} has its definition") from error
    return 0


def _config_of(source: Path, overrides: list[str]) -> RunConfig:
    path = source / "config.yaml" if source.is_dir() else source
    return load_run_config(path, overrides, world_size=None)


def _require_key() -> None:
    if not has_key():
        raise ConfigError(
            "WANDB_API_KEY: is not set, and `wandb login` has stored no key for this server; do one of them"
        )


if __name__ == "__main__":
    sys.exit(run_command(main))
