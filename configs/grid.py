"""The grid file: what varies over the runs of an ablation.

    variants = every combination of the axes of `product`
             + every entry of `cases` + every entry of `variants` - what `exclude` names
    runs     = every variant with every seed; runs of one seed are paired: same initial weights, same samples in the
               same order, same dropout

A setting is a configuration key with dots and its value. configs/grid_expand.py makes the variants.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from configs.typed import flat

_SLURM_TIMES = ("time", "time-min", "begin", "deadline")


@dataclass(frozen=True, kw_only=True)
class AxisConfig:
    """One thing that varies: a `key` and its `values`, several keys in step (`zip`), or named `choices` of settings."""

    name: str = ""
    """How names of variants and `exclude` call it; empty: the last part of its key."""
    key: str = ""
    """A configuration key..."""
    values: list[Any] = field(default_factory=list)
    """...and the values it takes."""
    zip: dict[str, Any] = field(default_factory=dict)
    """Keys with lists of equal length: the first values of all, the second values of all, and so on."""
    choices: dict[str, Any] = field(default_factory=dict)
    """Settings by name, for what one key cannot say; the name alone stands in the name of the variant."""

    def problems(self) -> list[str]:
        """Every inconsistency, one line each."""
        kinds = [bool(self.key or self.values), bool(self.zip), bool(self.choices)]
        if sum(kinds) != 1:
            return ["needs exactly one of key with values, zip, and choices"]
        found = []
        if kinds[0] and not (self.key and self.values):
            found.append("key and values belong together, and values must not be empty")
        if self.zip:
            lengths = {key: len(values) if isinstance(values, list) else 0 for key, values in self.zip.items()}
            if 0 in lengths.values() or len(set(lengths.values())) > 1:
                sizes = ", ".join(f"{key} has {length}" for key, length in lengths.items())
                found.append(f"zip: needs lists of equal length, at least 1 ({sizes})")
        found += [
            f"choices.{name}: must be a table of settings, not {settings!r}"
            for name, settings in self.choices.items()
            if not isinstance(settings, Mapping)
        ]
        if self.choices and self.name == "":
            found.append("name: is missing; choices have no key to be called after")
        return found

    @property
    def title(self) -> str:
        """Its name, given or derived."""
        return self.name or "-".join(key.rsplit(".", 1)[-1] for key in ([self.key] if self.key else self.zip))

    def points(self) -> Iterator["Point"]:
        """Its places in order."""
        for value in self.values:
            yield Point(self.title, f"{self.title}-{value_label(value)}", value, {self.key: value})
        for values in zip(*self.zip.values(), strict=True):
            label = "-".join(value_label(value) for value in values)
            yield Point(self.title, f"{self.title}-{label}", label, dict(zip(self.zip, values, strict=True)))
        for name, settings in self.choices.items():
            yield Point(self.title, name, name, flat(settings))


class Point(NamedTuple):
    """One place on an axis."""

    axis: str
    label: str
    value: Any
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class HalvingConfig:
    """Early stop of hopeless variants by successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943)."""

    rungs: list[int] = field(default_factory=list)
    """Steps at which variants are compared; each must be an evaluation of every run. Empty: nothing is stopped."""
    keep: float = 0.5
    """Share of the variants that go on from a rung, rounded up; the baseline always does."""
    metric: str = "eval/loss"
    """Key of an evaluation; lower is better. Compared is its mean over the seeds that all variants have reached."""

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        found = []
        if any(rung < 1 for rung in self.rungs) or sorted(set(self.rungs)) != self.rungs:
            found.append(f"rungs: {self.rungs} must be steps, each larger than the one before")
        if not (math.isfinite(self.keep) and 0 < self.keep < 1):
            found.append(f"keep: {self.keep} must be between 0 and 1")
        if not self.metric:
            found.append("metric: is empty; name one of an evaluation, such as eval/loss")
        return found


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """A grid file."""

    name: str = ""
    """Name of the grid, of its folder under runs/ and of the W&B group; empty: the file's name."""
    folder: str = ""
    """Folder of the grid; empty means runs/<name>. Running again with the same folder continues."""
    config: str = ""
    """The configuration all runs start from, relative to this file."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Settings of all runs: tables as in a configuration, or keys with dots."""
    product: list[AxisConfig] = field(default_factory=list)
    """Axes; every combination is a variant."""
    cases: list[Any] = field(default_factory=list)
    """Further variants: a table of settings each, named after them."""
    variants: dict[str, Any] = field(default_factory=dict)
    """Further variants: tables of settings by name; an empty one is the base as it is."""
    exclude: list[Any] = field(default_factory=list)
    """Combinations to leave out: tables of axis names or keys and the value (or list of values) they have there."""
    seeds: list[int] = field(default_factory=list)
    """Every variant is run with each; empty: with the base's seed."""
    baseline: str = ""
    """The variant others are compared with, pair by pair of the same seed."""
    ranks: int = 1
    """Ranks of each run."""
    retries: int = 1
    """How often a run that failed by no fault of its settings is started again, each time the grid is run."""
    halving: HalvingConfig = field(default_factory=HalvingConfig)
    slurm: dict[str, Any] = field(default_factory=dict)
    """Options of sbatch for --slurm, such as {partition: gpu, time: "24:00:00"}."""

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        found = [f"product[{i}]: {line}" for i, axis in enumerate(self.product) for line in axis.problems()]
        found += [f"halving.{line}" for line in self.halving.problems()]
        if not self.config:
            found.append("config: is missing; name the configuration that all runs start from")
        for name, entries in (("cases", self.cases), ("exclude", self.exclude)):
            found += [
                f"{name}[{i}]: must be a table of settings, and not empty"
                for i, entry in enumerate(entries)
                if not isinstance(entry, Mapping) or not entry
            ]
        found += [
            f"variants.{name}: must be a table of settings, not {settings!r}"
            for name, settings in self.variants.items()
            if not isinstance(settings, Mapping)
        ]
        if len(set(self.seeds)) != len(self.seeds):
            found.append(f"seeds: {self.seeds} names a seed twice")
        found += [f"seeds: {seed} must be in [0, 2^32)" for seed in self.seeds if not 0 <= seed < 2**32]
        if self.ranks < 1:
            found.append(f"ranks: {self.ranks} must be at least 1")
        if self.retries < 0:
            found.append(f"retries: {self.retries} is negative; use 0 to give up at once")
        for name, value in self.slurm.items():
            if name in _SLURM_TIMES and not isinstance(
                value, str
            ):  # YAML reads 1:00:00 as 3600, sbatch that as minutes
                found.append(f'slurm.{name}: {value!r} is no time; write it in quotes, such as "24:00:00"')
                continue
            is_plain = isinstance(value, (str, int, float)) and not isinstance(value, bool)
            is_plain = is_plain and re.fullmatch(r"[^\s'\"\\$`#]+", str(value)) is not None
            if not re.fullmatch(r"[a-z][a-z-]*", name) or not is_plain:
                found.append(f"slurm.{name}: {value!r} is no option of sbatch; write its long name and a plain value")
            elif name in ("array", "signal", "output", "open-mode", "job-name", "requeue", "ntasks-per-node"):
                found.append(f"slurm.{name}: is set by the grid; remove it")
        return found


def value_label(value: Any) -> str:
    """A value as part of a file name: letters, digits, '.', '+' and '-'."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, (list, tuple)):
        return "-".join(value_label(item) for item in value) or "empty"
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", str(value)).strip("-.") or "empty"
