"""Early stop of hopeless variants: successive halving over the rungs of a grid.

All seeds of a variant go on or are stopped together, and variants are compared on the seeds that every one of them
has reached, so that no variant wins by its seeds. A decision is written down when it is made and never made again.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from configs.grid import HalvingConfig
from configs.grid_loader import Grid
from launch._grid_state import write_json
from trainer.errors import CheckpointError, ConfigError

FILE = "halving.json"


@dataclass(frozen=True)
class Decision:
    """What happened at one rung."""

    rung: int
    seeds: list[int]
    """Seeds that the comparison is of."""
    means: dict[str, float | None]
    """Mean of the metric over them by variant; null where it is not finite."""
    kept: list[str]
    stopped: list[str]


def decide(config: HalvingConfig, rung: int, values: Mapping[str, Mapping[int, float]], baseline: str) -> Decision:
    """Who goes on. `values`: for each contender, the metric at the rung by seed; runs that failed are absent.

    The best ceil(keep x n) go on, and the baseline; a mean that is not finite is worse than all, and so is a variant
    whose runs have all failed. Without a seed that the others have in common nothing can be compared: all go on.
    """
    present = [set(by_seed) for by_seed in values.values() if by_seed]
    seeds = sorted(set.intersection(*present)) if present else []
    means = {
        name: _mean([by_seed[seed] for seed in seeds]) if seeds and by_seed else math.nan
        for name, by_seed in values.items()
    }
    order = sorted(means, key=lambda name: means[name] if math.isfinite(means[name]) else math.inf)
    best = set(order[: math.ceil(config.keep * len(order))] if seeds else order)
    kept = [name for name in values if name in best or name == baseline]
    return Decision(
        rung, seeds, {name: mean if math.isfinite(mean) else None for name, mean in means.items()},
        kept, [name for name in values if name not in kept],
    )  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    """Mean of finite numbers, however large; NaN if one is not finite."""
    if not all(map(math.isfinite, values)):
        return math.nan
    return math.fsum(value / len(values) for value in values)


class Halving:
    """The rungs that are behind a grid, and the one ahead of it."""

    def __init__(self, grid: Grid) -> None:
        """Raises CheckpointError or ConfigError if the folder's decisions are not of this grid's rungs and variants."""
        self._grid, self._config = grid, grid.config.halving
        self._path = grid.folder / FILE
        self.decisions = _read(self._path)
        made = [decision.rung for decision in self.decisions]
        if made != self._config.rungs[: len(made)]:
            raise CheckpointError(
                f"{self._path}: variants were stopped at {made}, halving.rungs is {self._config.rungs}; restore the "
                "rungs, or give the grid another name"
            )
        late = [each.name for each in grid.variants if made and each.name not in self.decisions[0].means]
        if late:
            raise ConfigError(
                f"variants: {', '.join(late)} came after halving decided at step {made[0]}; give the grid another name"
            )

    @property
    def rung(self) -> int | None:
        """The step that all contenders must reach before any goes on; None if none is left."""
        rungs = self._config.rungs
        return rungs[len(self.decisions)] if len(self.decisions) < len(rungs) else None

    @property
    def metric(self) -> str:
        return self._config.metric

    def contenders(self) -> list[str]:
        """Variants that have not been stopped."""
        stopped = {name for decision in self.decisions for name in decision.stopped}
        return [variant.name for variant in self._grid.variants if variant.name not in stopped]

    def stopped_by(self, variant: str) -> str:
        """Why a variant was stopped, in one line; empty if it was not."""
        for decision in self.decisions:
            if variant in decision.stopped:
                ranked = sorted(decision.means, key=lambda name: _or_inf(decision.means[name]))
                value = decision.means[variant]
                shown = "not finite" if value is None else f"{value:.4f}"
                return (
                    f"halving at step {decision.rung}: {self.metric} {shown}, place {ranked.index(variant) + 1} of "
                    f"{len(ranked)}, {len(decision.kept)} went on"
                )
        return ""

    def settle(self, values: Mapping[str, Mapping[int, float]]) -> Decision:
        """Decide at the rung ahead, and write it down. `values` as for `decide`, of every contender."""
        assert self.rung is not None
        decision = decide(self._config, self.rung, values, self._grid.config.baseline)
        write_json(self._path, [asdict(each) for each in [*self.decisions, decision]])
        self.decisions.append(decision)
        return decision


def _or_inf(value: float | None) -> float:
    return math.inf if value is None else value


def _read(path: Path) -> list[Decision]:
    if not path.exists():
        return []
    try:
        return [Decision(**fields) for fields in json.loads(path.read_text())]
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: is no list of decisions ({error}); delete it to decide again") from error
