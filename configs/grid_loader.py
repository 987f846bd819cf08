"""From a grid file to runs whose whole configurations have been checked, before anything is started."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.grid import GridConfig
from configs.grid_expand import RESERVED, Variant, expand, run_name
from configs.loader import load_run_config, parse_overrides, read_tree
from configs.schema import RunConfig, folder_name_problems
from configs.typed import Leaf, build_typed, flat, leaf_key, leaves_of
from trainer.data.prepare import preparation_settings
from trainer.errors import ConfigError


@dataclass(frozen=True)
class GridRun:
    """One run of a grid."""

    name: str
    """Its folder below the grid's."""
    variant: str
    seed: int
    settings: dict[str, Any]
    """What its variant sets."""
    config: RunConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.folder)


@dataclass(frozen=True)
class Grid:
    """A grid and all its runs: every variant with the first seed, then every variant with the second, and so on."""

    config: GridConfig
    name: str
    folder: Path
    base: Path
    variants: list[Variant]
    runs: list[GridRun]

    def axes(self) -> dict[str, list[Any]]:
        """The values of each axis, by its name or key."""
        return {axis.key or axis.title: [point.value for point in axis.points()] for axis in self.config.product}

    def runs_of(self, variant: str) -> list[GridRun]:
        return [run for run in self.runs if run.variant == variant]


def load_grid(path: str | Path, overrides: Sequence[str] = ()) -> Grid:
    """Read a grid file and the configuration of each of its runs; `overrides` are settings of all runs.

    Raises ConfigError with every problem found, of the grid and of all runs.
    """
    path = Path(path)
    tree = read_tree(path, kind="grid file", presets=Path(__file__).parent / "grids")
    config, problems = build_typed(GridConfig, leaves_of(tree, str(path)))
    if not problems:
        problems = [f"{path}: {line}" for line in config.problems()]
    if problems:
        raise ConfigError(*problems)
    variants, problems = expand(config)
    name = config.name or path.stem
    problems += folder_name_problems(name)
    varied = {key for variant in variants for key in variant.settings} | set(RESERVED)
    given = [leaf_key(leaf) for source, tree in parse_overrides(overrides) for leaf in leaves_of(tree, source)]
    problems += [
        f"{key}: is set by the grid, so it cannot be given on the command line" for key in given if key in varied
    ]
    if problems:
        raise ConfigError(*(f"{path}: {line}" for line in problems))

    folder = Path(config.folder or f"runs/{name}")
    base = path.parent / config.config
    first_seeds = {variant.name: None for variant in variants}
    checked: dict[str, RunConfig] = {}
    complaints: dict[str, list[str]] = {}
    for variant in first_seeds:
        settings = next(each.settings for each in variants if each.name == variant)
        leaves = _leaves(flat(config.overrides), str(path)) + _leaves(settings, str(path))
        try:
            checked[variant] = load_run_config(base, overrides, world_size=config.ranks, settings=leaves)
        except ConfigError as error:
            for line in error.problems:
                complaints.setdefault(line, []).append(variant)
    if complaints:
        raise ConfigError(*(_with_variants(line, which, len(variants)) for line, which in complaints.items()))

    runs = []
    for seed in config.seeds or [next(iter(checked.values())).seed]:
        for variant_ in variants:
            run = run_name(variant_.name, seed)
            full = _for_run(checked[variant_.name], name, run, folder / run, variant_.name, seed)
            runs.append(GridRun(run, variant_.name, seed, variant_.settings, full))
    problems = list(dict.fromkeys(line for run in runs for line in run.config.problems(config.ranks)))
    problems += _corpus_problems(runs) + _halving_problems(config, runs)
    if problems:
        raise ConfigError(*(f"{path}: {line}" for line in problems))
    return Grid(config, name, folder, base, variants, runs)


def _leaves(settings: dict[str, Any], source: str) -> list[Leaf]:
    return [Leaf(tuple(key.split(".")), value, source) for key, value in settings.items()]


def _for_run(config: RunConfig, grid: str, name: str, folder: Path, variant: str, seed: int) -> RunConfig:
    tags = tuple(dict.fromkeys((*config.wandb.tags, variant)))
    return dataclasses.replace(
        config, name=name, run_dir=str(folder), seed=seed,
        wandb=dataclasses.replace(config.wandb, group=grid, tags=tags),
    )  # fmt: skip


def _with_variants(line: str, variants: list[str], of: int) -> str:
    if len(variants) == of and of > 1:
        return line
    more = f" and {len(variants) - 3} more" if len(variants) > 3 else ""
    return f"{line} (variant {', '.join(variants[:3])}{more})"


def _corpus_problems(runs: Sequence[GridRun]) -> list[str]:
    """Runs that want one folder to hold two corpora."""
    found: list[str] = []
    first: dict[str, tuple[str, dict[str, Any]]] = {}
    for run in runs:
        path, wanted = run.config.data.path, preparation_settings(run.config.data)
        other, has = first.setdefault(path, (run.variant, wanted))
        if has != wanted and other != run.variant:
            keys = ", ".join(f"data.{key}" for key in wanted if wanted[key] != has[key])
            found.append(f"data.path: {other} and {run.variant} share {path} but differ in {keys}; give each its own")
    return list(dict.fromkeys(found))


def _halving_problems(config: GridConfig, runs: Sequence[GridRun]) -> list[str]:
    found = []
    for run in runs:
        every, steps = run.config.evaluation.every, run.config.train.steps
        for rung in config.halving.rungs:
            if rung >= steps:
                found.append(f"halving.rungs: {rung} is not before the end of the runs (train.steps {steps})")
            elif every == 0 or rung % every:
                found.append(
                    f"halving.rungs: {rung} is no multiple of evaluation.every ({every}); nothing is measured there"
                )
    return list(dict.fromkeys(found))
