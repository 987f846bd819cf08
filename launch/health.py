"""Can these nodes train together? `torchrun --nproc_per_node=8 ... -m launch.health CONFIG [key=value ...]`.

The checks that `launch.train` makes before its first step, alone: all ranks reach each other; the same Python, torch,
DeepSpeed, code, configuration and accelerators everywhere; a run folder that all nodes share, with room for
checkpoints; clocks; bandwidth of an all-reduce and an all-to-all; and a rank that is slower than the others, by name.
Exit codes: 0 fit (warnings are printed), 2 unlike versions or configurations, 5 peers, 6 storage. `health.strict=true`
makes a warning an error. Under torchrun start it on every node exactly as the training.
"""

import argparse
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from configs.loader import load_run_config, to_dict
from configs.schema import RunConfig
from configs.typed import flat
from launch._cli import run_command
from moe.arithmetic import count_parameters
from trainer import ranks
from trainer.data.prepare import read_manifest
from trainer.errors import StorageError
from trainer.health import Health, check_health
from trainer.metrics import JsonlLog
from trainer.process_group import leave, start_process_group, stop_process_group

log = logging.getLogger("evenkeel")


def main(argv: list[str]) -> int:
    """Check and print; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.health", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file, for instance configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for instance health.strict=true")
    arguments = parser.parse_intermixed_args(argv)
    config = load_run_config(arguments.config, arguments.overrides, world_size=ranks.world_size())
    manifest = read_manifest(Path(config.data.path))
    vocab_size = manifest["tokenizer"]["vocab_size"] if manifest else config.data.vocab_size

    start_process_group(config.engine.collective_timeout_s)
    with _made(Path(config.folder)):
        health = examine(config, vocab_size)
    if ranks.is_main():
        sys.stdout.write("".join(f"{line}\n" for line in [*health.warnings, health.line()]))
    stop_process_group()
    return 0


@contextmanager
def _made(run_dir: Path) -> Iterator[None]:
    """The folder, on all nodes; what was not there before is gone afterwards, unless there is something in it.

    Raises StorageError on every rank.
    """
    missing, problem = [], None
    if ranks.is_main():
        try:
            missing = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"run_dir: {error.filename or run_dir}: {error.strerror}; make it writable or set another"
    problem = ranks.broadcast_object(problem)
    try:
        if problem is not None:
            raise StorageError(problem)
        yield
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


def examine(config: RunConfig, vocab_size: int) -> Health:
    """The checks of a run, in its folder; every rank calls it. Raises ConfigError, PeerLostError or StorageError."""
    return check_health(
        config.health,
        run_dir=Path(config.folder),
        settings=flat(to_dict(config)),
        checkpoint_bytes=checkpoint_bytes(config, vocab_size),
        keep=config.checkpoint.keep,
    )


def examine_and_record(config: RunConfig, vocab_size: int) -> None:
    """The checks before training: to the log, and with all numbers to health.jsonl, a line for each start."""
    if not config.health.enabled:
        return
    health = examine(config, vocab_size)
    if ranks.is_main():
        for line in health.warnings:
            log.warning("%s", line)
        log.info("%s", health.line())
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        JsonlLog(Path(config.folder) / "health.jsonl").append([{"time": started, **health.record}])


def checkpoint_bytes(config: RunConfig, vocab_size: int) -> float:
    """Bytes of one checkpoint, about: weights as they are, and Adam's two moments and master weights in float32."""
    weights, master = (2, 4) if config.engine.precision == "bf16" else (4, 0)
    return count_parameters(config.model, vocab_size).num_total * (weights + master + 8)


if __name__ == "__main__":
    leave(run_command(main))
