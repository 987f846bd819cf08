"""The commands that the pages show, as someone would type them."""

import argparse
import itertools
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

from configs.grid_loader import load_grid
from configs.loader import load_run_config
from tests.harness import ROOT

FOLDERS = ("", "launch", "moe", "reweighting", "trainer", "trainer/data", "tests/bench", "tests/bench/results")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text() for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.md"))
}
_NAMES = {
    "CONFIG": "tiny.yaml", "RUN": "runs/quickstart", "GRID": "runs/my-grid",
    "GRID.yaml": "configs/grids/ablation-demo.yaml",
    "A": "runs/a", "B": "runs/b", "N": "2", "RULE": "sign", "S": "linupper", "FOLDER": "exported",
}  # fmt: skip
"""What stands for the names in capitals; any other one is a file or folder that a command makes."""


class Command(NamedTuple):
    """A module with a `main`, and what it is given."""

    module: str
    words: list[str]

    def __str__(self) -> str:
        return f"{self.module} {shlex.join(self.words)}"


def commands(text: str) -> list[Command]:
    """Every command of a page, those in blocks first; one with alternatives is several, optional parts are there."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    found = [each for line in lines if re.search(r"-m launch\.\w", line) for each in _meant(line)]
    return [command for command in found if command.words]  # a bare one is a name in a sentence


def _meant(line: str) -> Iterator[Command]:
    line = re.sub(r"\[key=value \.\.\.\]", "seed=1", line).replace("\\|", "|")
    line = re.sub(r"\.\.\.(?=\s|\||$)", "", re.sub(r"\[(-[^\]]*)\]", r"\1", line))
    start, *others = line.split(" | ")
    for each in [start, *(" ".join([*shlex.split(start)[:3], other]) for other in others)]:
        words = shlex.split(each, comments=True)
        for chosen in itertools.product(*(word.split("|") for word in words)):
            yield _command(list(chosen))


def _command(words: list[str]) -> Command:
    if words[0] == "torchrun":
        module, arguments = "launch.torchrun", words[1:]
    else:
        assert words[:2] == ["python", "-m"], words
        module, arguments = words[2], words[3:]
    if module == "launch.torchrun" and arguments and "-m" not in arguments:
        arguments += ["-m", "launch.train", "CONFIG"]
    if module == "launch.ablate":
        arguments = [{"GRID": "GRID.yaml"}.get(word, word) for word in arguments]
    return Command(module, [re.sub(r"(?<==)N$", "2", _NAMES.get(word, word)) for word in arguments])


class _ParsedError(Exception):
    """Ends a command when it has read its arguments."""


def parsed(command: Command) -> argparse.Namespace:
    """What the command's own parser makes of its arguments; nothing that comes after is run."""
    found: list[argparse.Namespace] = []
    parse, intermixed = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_intermixed_args

    def parse_args(self: argparse.ArgumentParser, args: list[str]) -> argparse.Namespace:
        options = parse(self, args)
        if len(args) < len(command.words):  # launch.cluster looks at its first word before it knows its options
            return options
        found.append(options)
        raise _ParsedError

    def parse_intermixed_args(self: argparse.ArgumentParser, args: list[str]) -> argparse.Namespace:
        found.append(intermixed(self, args))
        raise _ParsedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(argparse.ArgumentParser, "parse_intermixed_args", parse_intermixed_args)
        with pytest.raises(_ParsedError):
            import_module(command.module).main(command.words)
    return found[0]


def check(command: Command, *, ranks: int | None = None) -> None:
    """Read the arguments as the command does, and the configuration that they name, for so many ranks or any.

    Raises SystemExit for arguments that the command does not take, ConfigError for a file or key that is not there.
    """
    options = parsed(command)
    if command.module == "launch.torchrun":
        assert options.module
        ranks = int(options.nproc_per_node) * int(options.nnodes.split(":")[-1])
        check(Command(options.training_script, options.training_script_args), ranks=ranks)
        return
    if command.module == "launch.ablate":
        load_grid(options.grid, options.overrides)
        return
    source = getattr(options, "config", None) or getattr(options, "source", None)
    if source is not None and not Path(source).is_dir():
        load_run_config(source, options.overrides, world_size=ranks)
