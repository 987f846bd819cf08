"""Plain nested values into dataclasses, strictly typed, with every problem reported rather than the first."""

import dataclasses
import functools
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

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
    problems, fitting = [], []
    for leaf in leaves:
        misfits = [_where(leaf) + line for line in _misfits(schema, _nested(leaf), "")]
        problems += misfits
        if not misfits:
            fitting.append(leaf)
    try:
        merged = _merge_all(merged, fitting)  # one merge costs what one leaf does
    except (OmegaConfBaseException, ValueError):
        for leaf in fitting:
            try:
                merged = _merge_all(merged, [leaf])
            except (OmegaConfBaseException, ValueError) as error:
                # OmegaConf leaves this to be filled in where it means an entry of a list.
                what = one_line(error).replace("Value '$VALUE' of type '$VALUE_TYPE'", f"an entry of {leaf.value}")
                problems.append(f"{_where(leaf)}{leaf_key(leaf)}: {what}")
    built = OmegaConf.to_object(merged)
    assert isinstance(built, schema)
    return built, problems


def convert_options(schema: type[T], options: Mapping[str, Any]) -> tuple[T, list[str]]:
    """`build_typed` for one nested mapping without a source."""
    return build_typed(schema, leaves_of(options, ""))


def _where(leaf: Leaf) -> str:
    return f"{leaf.source}: " if leaf.source else ""


def _nested(leaf: Leaf) -> Any:
    return functools.reduce(lambda inner, key: {key: inner}, reversed(leaf.key), leaf.value)


def _misfits(wanted: Any, value: Any, key: str) -> Iterator[str]:
    """Tables, lists and single values that stand where one of the others belongs, one line each.

    Unknown keys and values of a wrong kind are left to OmegaConf, which raises bare TypeErrors for these.
    """
    if value == "???":
        yield f"{key}: ??? is OmegaConf's word for no value at all; write the value"
        return
    if value is None:
        return
    wanted = _without_none(wanted)
    is_schema, origin = dataclasses.is_dataclass(wanted), get_origin(wanted) or wanted
    found = "a table" if isinstance(value, Mapping) else "a list" if isinstance(value, (list, tuple)) else repr(value)
    kind = "a table" if is_schema or origin is dict else "a list" if origin in (list, tuple) else "one value"
    if wanted is not Any and (found if found in ("a table", "a list") else "one value") != kind:
        yield f"{key}: must be {kind}, not {found}"
    elif isinstance(value, Mapping):
        fields = _hints(wanted) if is_schema else {}
        of_all = get_args(wanted)[1] if get_args(wanted) else Any
        for name, inner in value.items():
            yield from _misfits(fields.get(str(name), of_all), inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        of_all = get_args(wanted)[0] if get_args(wanted) else Any
        for i, inner in enumerate(value):
            yield from _misfits(of_all, inner, f"{key}[{i}]")


def _without_none(wanted: Any) -> Any:
    """Optional[X] as X; of any other union everything is accepted here."""
    if not isinstance(wanted, types.UnionType) and get_origin(wanted) is not Union:
        return wanted
    members = [member for member in get_args(wanted) if member is not types.NoneType]
    return members[0] if len(members) == 1 else Any


@functools.cache
def _hints(schema: type[object]) -> dict[str, Any]:
    return get_type_hints(schema)


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
