"""Plain nested values into dataclasses, strictly typed, with every problem reported rather than the first."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


class Leaf(NamedTuple):
    """One value of a configuration, where it goes and where it came from."""

    key: tuple[str, ...]
    value: Any
    source: str


def leaves_of(tree: Mapping[Any, Any], source: str) -> list[Leaf]:
    """The values of a nested mapping. Lists are values; so is an empty mapping."""

    def walk(node: Mapping[Any, Any], prefix: tuple[str, ...]) -> Iterator[Leaf]:
        for key, value in node.items():
            path = (*prefix, str(key))
            if isinstance(value, Mapping) and value:
                yield from walk(value, path)
            else:
                yield Leaf(path, value, source)

    return list(walk(tree, ()))


def leaf_key(leaf: Leaf) -> str:
    """The full key of a value, with dots."""
    return ".".join(leaf.key)


def flat(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """Tables and keys with dots as full keys alone, each with its value."""
    return {leaf_key(leaf): leaf.value for leaf in leaves_of(tree, "")}


def build_typed(schema: type[T], leaves: Sequence[Leaf]) -> tuple[T, list[str]]:
    """An instance of the dataclass `schema` with each leaf set in turn, and a line for each leaf that does not fit.

    Unknown keys come with a suggestion, values are not converted between kinds (3.7 is no int, "yes" no bool).
    """
    merged = _defaults(schema)  # type: ignore[arg-type]  # a class is hashable
    problems = []
    try:
        merged = _merge_all(merged, leaves)  # one merge costs what one leaf does
    except (OmegaConfBaseException, ValueError):
        for leaf in leaves:
            try:
                merged = _merge_all(merged, [leaf])
            except (OmegaConfBaseException, ValueError) as error:
                where = f"{leaf.source}: " if leaf.source else ""
                problems.append(f"{where}{leaf_key(leaf)}: {one_line(error)}")
    built = OmegaConf.to_object(merged)
    assert isinstance(built, schema)
    return built, problems


def convert_options(schema: type[T], options: Mapping[str, Any]) -> tuple[T, list[str]]:
    """`build_typed` for one nested mapping without a source."""
    return build_typed(schema, leaves_of(options, ""))


def one_line(error: Exception) -> str:
    """What an error of OmegaConf says, without the lines that repeat the key."""
    lines = str(error).splitlines()
    hints = [line.strip() for line in lines[1:] if "Did you mean" in line]
    return " ".join([lines[0] if lines else type(error).__name__, *hints])


@functools.cache  # making one takes longer than merging into it
def _defaults(schema: type[object]) -> DictConfig:
    """Not to be changed: a merge makes a copy."""
    config = OmegaConf.structured(schema)
    OmegaConf.set_readonly(config, False)
    assert isinstance(config, DictConfig)
    return config


def _merge_all(config: DictConfig, leaves: Sequence[Leaf]) -> DictConfig:
    tree: dict[str, Any] = {}
    for leaf in leaves:
        if "${" in str(leaf.value):
            raise ValueError("interpolation (${...}) is not supported; write the value")
        node = tree
        for part in leaf.key[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ValueError(f"is set to a value and to a table at '{part}'")
        if leaf.value == {}:
            node.setdefault(leaf.key[-1], {})  # an empty table adds nothing to what is there
        else:
            node[leaf.key[-1]] = leaf.value
    merged = OmegaConf.merge(config, tree)
    assert isinstance(merged, DictConfig)
    return merged
