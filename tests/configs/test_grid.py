"""Grids: what they expand to, what is refused, and every grid that is shipped."""

import dataclasses
from math import prod
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from configs.grid import AxisConfig, GridConfig, value_label
from configs.grid_expand import expand
from configs.grid_loader import load_grid
from moe.arithmetic import count_parameters
from tests.harness import ROOT
from trainer.errors import ConfigError

GRIDS = sorted((ROOT / "configs" / "grids").glob("*.yaml"))

KEYS = ("optimizer.learning_rate", "hooks.expert_bias.rate", "train.steps", "model.top_k")
scalars = st.one_of(st.integers(-5, 10**6), st.floats(allow_nan=False, allow_infinity=False), st.booleans())


@st.composite
def axes(draw: st.DrawFn) -> list[AxisConfig]:
    """One to three axes of different keys: values, two keys in step, or choices."""
    keys = list(draw(st.permutations(KEYS)))
    found = []
    for number in range(draw(st.integers(1, 3))):
        size = draw(st.integers(1, 4))
        kind = draw(st.sampled_from(["values", "zip", "choices"] if len(keys) > 3 - number else ["values", "choices"]))
        values = draw(st.lists(scalars, min_size=size, max_size=size, unique_by=value_label))
        if kind == "values":
            found.append(AxisConfig(key=keys.pop(), values=values))
        elif kind == "zip":
            found.append(AxisConfig(zip={keys.pop(): values, keys.pop(): values[::-1]}))
        else:
            key = keys.pop()
            found.append(
                AxisConfig(name=f"axis{number}", choices={f"c{i}-{number}": {key: v} for i, v in enumerate(values)})
            )
    return found


def size_of(axis: AxisConfig) -> int:
    return len(axis.values) or len(axis.choices) or len(next(iter(axis.zip.values())))


@given(axes())
def test_a_product_has_every_combination_once_under_a_name_of_its_own(product: list[AxisConfig]) -> None:
    variants, problems = expand(GridConfig(config="x", product=product))
    assert not problems
    assert len(variants) == prod(size_of(axis) for axis in product)
    assert len({variant.name.casefold() for variant in variants}) == len(variants)
    assert len({str(sorted(variant.settings.items())) for variant in variants}) == len(variants)
    for variant in variants:
        assert len(variant.name) <= 60
        assert all(character.isalnum() or character in ".+_-" for character in variant.name)
        assert not variant.name.startswith((".", "-"))
        assert set(variant.settings) == {
            key
            for axis in product
            for key in ([axis.key] if axis.key else axis.zip or next(iter(axis.choices.values())))
        }


@given(axes(), st.data())
def test_an_exclusion_removes_exactly_what_it_names(product: list[AxisConfig], data: st.DataObject) -> None:
    whole, _ = expand(GridConfig(config="x", product=product))
    place = data.draw(st.sampled_from(whole)).place
    names = data.draw(st.lists(st.sampled_from(sorted(place)), min_size=1, unique=True))
    entry = {name: place[name] for name in names}
    rest, problems = expand(GridConfig(config="x", product=product, exclude=[entry]))
    expected = [v for v in whole if any(v.place[name] != value for name, value in entry.items())]
    assert rest == expected
    assert problems == ([] if expected else ["product: the grid is empty; give it axes, cases or variants"])


def write_grid(folder: Path, **fields: Any) -> Path:
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({"config": str(ROOT / "configs" / "debug.yaml"), **fields}))
    return path


def test_seeds_pair_variants_and_all_else_is_the_base(tmp_path: Path) -> None:
    grid = load_grid(
        write_grid(
            tmp_path,
            product=[{"key": "hooks.expert_bias.rate", "values": [0.001, 0.1]}],
            cases=[{"hooks": {"expert_bias": {"rule": "none"}}}],
            variants={"long": {"train.steps": 40}},
            overrides={"train": {"global_batch_size": 4}, "wandb.tags": ["mine"]},
            seeds=[7, 5],
            baseline="rule-none",
        ),
        ["train.write_every=2"],
    )
    assert [variant.name for variant in grid.variants] == ["rate-0.001", "rate-0.1", "rule-none", "long"]
    assert [run.name for run in grid.runs] == [f"{v.name}_s{seed}" for seed in (7, 5) for v in grid.variants]
    for run in grid.runs:
        assert (run.config.seed, run.config.train.global_batch_size, run.config.train.write_every) == (run.seed, 4, 2)
        assert run.config.folder == f"runs/grid/{run.name}"
        assert (run.config.wandb.group, run.config.wandb.tags) == ("grid", ("mine", run.variant))
        assert run.config.train.steps == (40 if run.variant == "long" else 20)
    by_name = {run.name: run.config for run in grid.runs}
    assert by_name["rate-0.1_s7"].hooks["expert_bias"]["rate"] == 0.1
    assert by_name["rule-none_s5"].hooks["expert_bias"]["rule"] == "none"
    one, other = by_name["long_s7"], by_name["long_s5"]
    same = {"name": "", "run_dir": "", "seed": 0}
    assert dataclasses.replace(one, **same) == dataclasses.replace(other, **same)  # type: ignore[arg-type]


AXIS = {"key": "hooks.expert_bias.rate", "values": [0.001, 0.1]}
BAD_GRIDS: dict[str, dict[str, Any]] = {
    "Did you mean: 'product'": {"prodct": [AXIS]},
    "Did you mean: 'values'": {"product": [{"key": "seed", "valus": [1]}]},
    "product[0]: needs exactly one of key with values, zip, and choices": {"product": [{**AXIS, "zip": {"seed": [1]}}]},
    "zip: needs lists of equal length, at least 1 (seed has 1, train.steps has 2)": {
        "product": [{"zip": {"seed": [1], "train.steps": [1, 2]}}]
    },
    "Did you mean one of: 'num_experts'": {"product": [{"key": "model.num_expertss", "values": [8]}]},
    "top_k: 99 must be between 1 and num_experts (8) (variant top_k-99)": {
        "product": [{"key": "model.top_k", "values": [1, 99]}]
    },
    "hooks.expert_bias.rate is set by two axes": {"product": [AXIS, {**AXIS, "name": "other"}]},
    "two axes are called 'rate'": {"product": [AXIS, {"key": "model.top_k", "name": "rate", "values": [1]}]},
    "'rate-0.1' is there twice": {"product": [{**AXIS, "values": [0.1, 0.1]}]},
    "seed: is set by the grid itself (seeds)": {"product": [{"key": "seed", "values": [1, 2]}]},
    "overrides.run_dir: is set by the grid itself": {"product": [AXIS], "overrides": {"run_dir": "x"}},
    "baseline: no variant is called 'rate-1'; did you mean 'rate-0.1'?": {"product": [AXIS], "baseline": "rate-1"},
    "exclude[0]: matches no combination": {"product": [AXIS], "exclude": [{"rate": 0.5}]},
    "exclude[0].rat: no axis and no key of one; did you mean 'rate'?": {"product": [AXIS], "exclude": [{"rat": 0.1}]},
    "the grid is empty": {},
    "seeds: [1, 1] names a seed twice": {"product": [AXIS], "seeds": [1, 1]},
    "'a/b' cannot name a folder": {"variants": {"a/b": {}}},
    "variants A and a have the same name 'a'": {"variants": {"A": {}, "a": {"seed": 1}}},
    "variants a and b have the same settings": {"variants": {"a": {"train.steps": 1}, "b": {"train": {"steps": 1}}}},
    "config: is missing": {"config": "", "product": [AXIS]},
    "no such config file": {"config": "nowhere.yaml", "product": [AXIS]},
    "ranks: 0 must be at least 1": {"product": [AXIS], "ranks": 0},
    "not divisible by micro_batch_size x ranks = 2 x 3 = 6": {"product": [AXIS], "ranks": 3},
    "retries: -1 is negative": {"product": [AXIS], "retries": -1},
    "halving.rungs: 5 is no multiple of evaluation.every (10)": {"product": [AXIS], "halving": {"rungs": [5]}},
    "halving.rungs: 20 is not before the end": {"product": [AXIS], "halving": {"rungs": [20]}},
    "halving.keep: 1.0 must be between 0 and 1": {"product": [AXIS], "halving": {"rungs": [10], "keep": 1.0}},
    "share data/local_python but differ in data.vocab_size": {
        "product": [{"key": "data.vocab_size", "values": [300, 400]}]
    },
    "slurm.array: is set by the grid": {"product": [AXIS], "slurm": {"array": "0-9"}},
    "slurm.time: 'a b' is no option": {"product": [AXIS], "slurm": {"time": "a b"}},
    'slurm.time: 3600 is no time; write it in quotes, such as "24:00:00"': {"product": [AXIS], "slurm": {"time": 3600}},
    "slurm.nodelist: ['a'] is no option": {"product": [AXIS], "slurm": {"nodelist": ["a"]}},
    "slurm.exclusive: True is no option": {"product": [AXIS], "slurm": {"exclusive": True}},
    "name: 'g[bold]' cannot name a folder": {"product": [AXIS], "name": "g[bold]"},
    "product: must be a list, not a table": {"product": AXIS},
    "product[0]: must be a table, not 'seed'": {"product": ["seed"]},
    "product[0].zip: must be a table, not a list": {"product": [{"zip": ["seed"]}]},
    "product[0].choices: must be a table, not a list": {"product": [{"name": "x", "choices": ["a", "b"]}]},
    "product[0].values: must be a list, not 3": {"product": [{"key": "seed", "values": 3}]},
    "variants: must be a table, not a list": {"variants": ["a"]},
    "overrides: must be a table, not a list": {"product": [AXIS], "overrides": [1]},
    "seeds: must be a list, not 5": {"product": [AXIS], "seeds": 5},
    "halving: must be a table, not 'yes'": {"product": [AXIS], "halving": "yes"},
    "overrides.train.steps: ??? is": {"product": [AXIS], "overrides": {"train": {"steps": "???"}}},
    "interpolation (${...}) is not supported": {"product": [{**AXIS, "values": ["${oc.env:HOME}"]}]},
}  # fmt: skip


@pytest.mark.parametrize("says", BAD_GRIDS)
def test_a_bad_grid_is_refused_in_words(tmp_path: Path, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_grid(write_grid(tmp_path, **BAD_GRIDS[says]))
    assert says in str(caught.value)


def test_a_slurm_time_without_quotes_is_refused(tmp_path: Path) -> None:
    """YAML 1.1 reads it as a number of seconds, which sbatch would take for minutes."""
    path = write_grid(tmp_path, product=[AXIS])
    path.write_text(path.read_text() + "slurm: {time: 1:00:00, begin: 16:00}\n")
    with pytest.raises(ConfigError) as caught:
        load_grid(path)
    assert [line.split(": ", 1)[1] for line in caught.value.problems] == [
        'slurm.time: 3600 is no time; write it in quotes, such as "24:00:00"',
        'slurm.begin: 960 is no time; write it in quotes, such as "24:00:00"',
    ]


def test_all_problems_of_all_runs_come_at_once_and_each_once(tmp_path: Path) -> None:
    product = [{"key": "model.top_k", "values": [9, 2]}, {"key": "optimizer.learning_rate", "values": [-1.0, 1.0e-3]}]
    with pytest.raises(ConfigError) as caught:
        load_grid(write_grid(tmp_path, product=product, seeds=[1, 2], overrides={"model.num_heads": 7}))
    lines = caught.value.problems
    assert [line for line in lines if "num_heads: 7" in line and "variant" not in line], "every variant has it"
    assert len([line for line in lines if "top_k: 9" in line]) == 1
    assert len([line for line in lines if "learning_rate: -1.0" in line]) == 1


def test_the_command_line_cannot_set_what_varies(tmp_path: Path) -> None:
    path = write_grid(tmp_path, product=[AXIS])
    assert load_grid(path, ["train.steps=30"]).runs[0].config.train.steps == 30
    for override in ("hooks.expert_bias.rate=0.5", "name=x"):
        with pytest.raises(ConfigError, match="cannot be given on the command line"):
            load_grid(path, [override])


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_run_of_a_shipped_grid_is_valid(path: Path) -> None:
    grid = load_grid(path)
    assert len(grid.runs) == len(grid.variants) * max(len(grid.config.seeds), 1) > 2
    assert grid.config.baseline
    assert grid.name == path.stem


def test_expert_counts_are_of_fixed_active_parameters() -> None:
    runs = load_grid(ROOT / "configs" / "grids" / "expert-count.yaml").runs
    counts = [count_parameters(run.config.model, run.config.data.vocab_size) for run in runs]
    assert len({count.num_active - count.active["router"] for count in counts}) == 1
    assert len({count.num_total for count in counts}) > 2
