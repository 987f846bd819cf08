"""From a grid file to named variants: pure functions of it.

A variant is called after its place: the names of its choices and `axis-value`, joined by `_`.
"""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from configs.grid import AxisConfig, GridConfig, value_label
from configs.typed import flat

RESERVED = ("name", "run_dir", "seed", "wandb.group")
"""Keys that the grid itself sets for each run."""

_MAX_NAME = 60  # W&B takes tags of 64 characters


@dataclass(frozen=True)
class Variant:
    """One set of settings to be run with every seed."""

    name: str
    settings: dict[str, Any]
    """Configuration keys with dots, and their values."""
    place: dict[str, Any] = field(default_factory=dict)
    """Where it lies on the axes, by their names."""


def expand(config: GridConfig) -> tuple[list[Variant], list[str]]:
    """The variants of a grid without `problems()`, and every inconsistency among them."""
    variants, problems = [], []
    for points in itertools.product(*(axis.points() for axis in config.product)) if config.product else ():
        keys = Counter(key for point in points for key in point.settings)
        problems += [f"product: {key} is set by two axes" for key, times in keys.items() if times > 1]
        settings = {key: value for point in points for key, value in point.settings.items()}
        name = _short("_".join(point.label for point in points))
        variants.append(Variant(name, settings, {point.axis: point.value for point in points}))
    variants, unused = _without(variants, config.exclude)
    problems += unused
    for entry in config.cases:
        settings = flat(entry)
        name = "_".join(f"{key.rsplit('.', 1)[-1]}-{value_label(value)}" for key, value in settings.items())
        variants.append(Variant(_short(name), settings))
    variants += [Variant(name, flat(settings)) for name, settings in config.variants.items()]
    problems += _axis_problems(config.product) + _variant_problems(config, variants)
    return variants, list(dict.fromkeys(problems))


def run_name(variant: str, seed: int) -> str:
    """The folder of a run, below the grid's."""
    return f"{variant}_s{seed}"


def _axis_problems(axes: Sequence[AxisConfig]) -> list[str]:
    titles = Counter(axis.title for axis in axes)
    found = [f"product: two axes are called '{name}'; give one a name" for name, n in titles.items() if n > 1]
    for number, axis in enumerate(axes):
        labels = Counter(point.label.casefold() for point in axis.points())
        found += [f"product[{number}]: '{label}' is there twice" for label, n in labels.items() if n > 1]
    return found


def _variant_problems(config: GridConfig, variants: Sequence[Variant]) -> list[str]:
    if not variants:
        return ["product: the grid is empty; give it axes, cases or variants"]
    found = []
    for name in [name for axis in config.product for name in axis.choices] + list(config.variants):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+_-]*", name) or len(name) > _MAX_NAME:
            found.append(
                f"'{name}' cannot name a folder; use letters, digits, '.', '+', '-' and '_', up to {_MAX_NAME}"
            )
    seen: dict[str, str] = {}
    for variant in variants:
        for given in (f"name '{variant.name.casefold()}'", f"settings {sorted(variant.settings.items(), key=str)}"):
            if given in seen:
                found.append(f"variants {seen[given]} and {variant.name} have the same {given}; rename or remove one")
            seen[given] = variant.name
        found += [
            f"{key}: is set by the grid itself{' (seeds)' if key == 'seed' else ''}; remove it from {variant.name}"
            for key in RESERVED
            if key in variant.settings
        ]
    found += [
        f"overrides.{key}: is set by the grid itself; remove it" for key in RESERVED if key in flat(config.overrides)
    ]
    names = [variant.name for variant in variants]
    if config.baseline and config.baseline not in names:
        found.append(f"baseline: no variant is called '{config.baseline}'{_hint(config.baseline, names)}")
    return found


def _without(variants: list[Variant], exclude: Sequence[Mapping[str, Any]]) -> tuple[list[Variant], list[str]]:
    """Variants that no entry of `exclude` matches, and a line for each entry that matches none."""
    problems, dropped = [], set()
    known = sorted({key for variant in variants for key in (variant.place.keys() | variant.settings.keys())})
    for number, entry in enumerate(exclude):
        wanted = {
            **{k: v for k, v in entry.items() if k in known},
            **flat({k: v for k, v in entry.items() if k not in known}),
        }
        unknown = [key for key in wanted if key not in known]
        problems += [f"exclude[{number}].{key}: no axis and no key of one{_hint(key, known)}" for key in unknown]
        matching = {variant.name for variant in variants if all(_matches(variant, k, v) for k, v in wanted.items())}
        if not matching and not unknown:
            problems.append(f"exclude[{number}]: matches no combination; remove it")
        dropped |= matching
    return [variant for variant in variants if variant.name not in dropped], problems


def _matches(variant: Variant, key: str, wanted: Any) -> bool:
    has = variant.place[key] if key in variant.place else variant.settings.get(key)
    return has == wanted or (isinstance(wanted, list) and has in wanted)


def _hint(name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; there are {', '.join(known[:12])}"


def _short(name: str) -> str:
    if len(name) <= _MAX_NAME:
        return name
    return f"{name[: _MAX_NAME - 9].rstrip('-._')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
