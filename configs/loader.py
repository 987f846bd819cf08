"""From YAML files and `key=value` overrides to a checked RunConfig.

A file may name others to start from: `include: [quickstart.yaml]`, relative to itself; later files win, the file
itself wins over what it includes, overrides win over all. Every problem is reported at once, with the full key
and the file it came from. There are no interpolations: a config cannot read the environment it will be logged with.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.hooks import resolve_hooks
from configs.schema import RunConfig
from configs.typed import Leaf, build_typed, leaves_of, one_line
from trainer.errors import ConfigError

_MAX_BYTES = 1 << 20
_OVERRIDE = "command line"


def load_run_config(
    path: str | Path, overrides: Sequence[str] = (), *, world_size: int | None = 1, settings: Sequence[Leaf] = ()
) -> RunConfig:
    """Read, merge and check a run configuration for `world_size` ranks; None is for looking at a run, on any number.

    `settings` win over the file, `overrides` over both.

    Raises ConfigError with every problem found: syntax, unknown keys, wrong types, values that contradict each other.
    """
    leaves: list[Leaf] = []
    for source, tree in _read_with_includes(Path(path), ()):
        leaves += leaves_of(tree, source)
    leaves += settings
    for source, tree in parse_overrides(overrides):
        leaves += leaves_of(tree, source)
    config, problems = build_typed(RunConfig, leaves)
    if problems:
        raise ConfigError(*problems)
    resolved, hook_problems = resolve_hooks(
        config.hooks,
        is_frozen=config.train.accumulation == "frozen",
        has_phases=bool(config.data.phases),
        is_uniform=world_size is not None and config.model.uniform_routing and config.model.num_moe_layers > 0,
    )
    problems = config.problems(world_size) + hook_problems
    if problems:
        raise ConfigError(*(f"{path}: {line}" for line in problems))
    return dataclasses.replace(config, hooks=resolved)


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML; loading it gives an equal RunConfig."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The resolved configuration as nested plain values (tuples become lists, as they do in YAML and JSON)."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(config))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _read_with_includes(path: Path, stack: tuple[Path, ...]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if path.resolve() in stack:
        raise ConfigError(f"{path}: includes itself through {' -> '.join(p.name for p in stack)}")
    tree = read_tree(path)
    included = tree.pop("include", [])
    if not isinstance(included, list) or not all(isinstance(name, str) for name in included):
        raise ConfigError(f"{path}: include: must be a list of file names, not {included!r}")
    for name in included:
        yield from _read_with_includes(path.parent / name, (*stack, path.resolve()))
    yield str(path), tree


def read_tree(path: Path, *, kind: str = "config file", presets: Path = Path(__file__).parent) -> dict[str, Any]:
    """The keys and values of one YAML file, as they stand there. `kind` and `presets` are for the message if it is
    missing. Raises ConfigError."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path}: is larger than 1 MiB; this is not a configuration file")
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        names = ", ".join(sorted(p.stem for p in presets.glob("*.yaml")))
        where = presets.relative_to(Path(__file__).parents[1])
        raise ConfigError(f"{path}: no such {kind}; presets in {where}/: {names}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; name a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: is not valid YAML ({' '.join(str(error).split())})") from None
    tree = OmegaConf.to_container(loaded, resolve=False)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold keys and values, not {type(tree).__name__}")
    return {str(key): value for key, value in tree.items()}


def parse_overrides(overrides: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The tree that each `key=value` stands for, and where it came from. Raises ConfigError."""
    for item in overrides:
        if "=" not in item or item.startswith("-"):
            raise ConfigError(f"{_OVERRIDE}: '{item}' is not of the form key=value")
        try:
            tree = OmegaConf.to_container(OmegaConf.from_dotlist([item]), resolve=False)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"{_OVERRIDE}: '{item}' cannot be read ({one_line(error)})") from None
        assert isinstance(tree, dict)
        yield _OVERRIDE, {str(key): value for key, value in tree.items()}
