"""No optimisation changes the mathematics: each alone and all together against plain torch, and against an earlier day.

Plain torch is one process, the whole batch at once, experts in Python, all logits, every graph kept, AdamW unfused, and no
DeepSpeed (tests/dist/reference.py). The table says which optimisations must give the bits of the engine without them, for
they keep the order of sums, and which only the same numbers, within 1e-6 of each step's loss.

Routing is real. That rounding sends no token to other experts, after which losses part, is not luck but looked at: the
reference's tightest choice is far wider than rounding.
"""

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.dist.golden import GOLDEN, Plain, plain
from tests.harness import run

CLOSE = 1e-6
"""Relative, of each step's loss: a few roundings of float32 to 6e-8, and what ten steps of AdamW make of them."""


class Row(NamedTuple):
    """One set of optimisations: overrides of golden.yaml, which has none."""

    overrides: list[str]
    ranks: int = 1
    compiled: bool = False
    """Whether experts run in C++."""
    same_bits: str = ""
    """The row whose losses these must be, bit for bit; empty: other sums, so the same within `CLOSE`."""


TILES, TWO_PASS, AUTO = ["model.loss_tile=24"], ["train.accumulation=two_pass"], ["train.accumulation=auto"]
SELECTIVE, BLOCK = ["model.activation_recompute=selective"], ["model.activation_recompute=block"]
ZERO = [[f"engine.zero_stage={stage}"] for stage in range(3)]
ZERO.append(["engine={zero_stage: 3, zero_options: {stage3_param_persistence_threshold: 0}}", *TWO_PASS])
EXPERTS = ["engine.expert_parallel_size=2"]
TABLE: dict[str, Row] = {
    "engine, fused AdamW": Row([]),
    "experts in C++": Row([], compiled=True),
    "head in tiles": Row(TILES),
    "recomputed, selective": Row(SELECTIVE, same_bits="engine, fused AdamW"),
    "recomputed, block": Row(BLOCK, same_bits="engine, fused AdamW"),
    "two passes": Row(TWO_PASS, same_bits="engine, fused AdamW"),
    "graphs by memory": Row(AUTO, same_bits="engine, fused AdamW"),
    "ZeRO 1": Row(ZERO[1]),
    "ZeRO 2": Row(ZERO[2]),
    "all": Row([*TILES, *SELECTIVE, *AUTO, *ZERO[1]], compiled=True),
    "2 ranks, ZeRO 0": Row(ZERO[0], ranks=2),
    "2 ranks, ZeRO 1": Row(ZERO[1], ranks=2),
    "2 ranks, ZeRO 2": Row(ZERO[2], ranks=2),
    "2 ranks, ZeRO 3": Row(ZERO[3], ranks=2),
    "2 ranks, ZeRO 3, selective": Row([*ZERO[3], *SELECTIVE], ranks=2, same_bits="2 ranks, ZeRO 3"),
    "2 ranks, experts over 2": Row([*ZERO[1], *EXPERTS], ranks=2),
    "2 ranks, experts over 2, selective": Row(
        [*ZERO[1], *EXPERTS, *SELECTIVE], ranks=2, same_bits="2 ranks, experts over 2"
    ),
    "2 ranks, all": Row([*TILES, *SELECTIVE, *AUTO, *ZERO[2]], ranks=2, compiled=True),
    "2 ranks, all, experts over 2": Row([*TILES, *BLOCK, *AUTO, *ZERO[2], *EXPERTS], ranks=2, compiled=True),
}
# Compiling takes half a minute.
COMPILED: dict[str, Row] = {
    "2 ranks, regions compiled": Row(["model.compile=true", *ZERO[0]], ranks=2),
    "2 ranks, regions compiled, block": Row(
        ["model.compile=true", *ZERO[0], *BLOCK], ranks=2, same_bits="2 ranks, regions compiled"
    ),
    "2 ranks, regions compiled, all": Row(
        ["model.compile=true", *TILES, *BLOCK, *TWO_PASS, *ZERO[2], *EXPERTS], ranks=2, compiled=True
    ),
}
# What a comparison of losses must be able to see: each is another training, by a little.
OTHER = [
    "optimizer.beta2=0.949", "optimizer.weight_decay=0.11", "optimizer.clip_norm=0", "model.routed_scale=1.0001",
    "model.aux_loss.z=0.0011", "hooks.expert_bias.rate=0.02", "hooks.sample_reweight.temperature.value=0.501",
]  # fmt: skip


@pytest.fixture(scope="module")
def reference() -> Plain:
    return plain()


def train(table: dict[str, Row], folder: Path) -> dict[str, list[float]]:
    """Losses of every row, by name."""
    found = {}
    for ranks in sorted({row.ranks for row in table.values()}):
        names = [name for name, row in table.items() if row.ranks == ranks]
        plan = json.dumps([(table[name].overrides, table[name].compiled) for name in names])
        done = run("tests.dist.golden", plan, str(folder / f"{ranks}.json"), ranks=ranks)
        assert done.returncode == 0, done.stderr[-4000:]
        found |= dict(zip(names, json.loads((folder / f"{ranks}.json").read_text()), strict=True))
    return found


def check(row: Row, found: list[float], losses: dict[str, list[float]], reference: Plain) -> None:
    assert found == pytest.approx(reference.losses, rel=CLOSE)
    if row.same_bits:
        assert found == losses[row.same_bits]


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    return train(TABLE, tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", TABLE)
def test_an_optimisation_changes_no_loss(name: str, losses: dict[str, list[float]], reference: Plain) -> None:
    check(TABLE[name], losses[name], losses, reference)


@pytest.mark.slow
def test_compiled_regions_change_no_loss(tmp_path: Path, reference: Plain) -> None:
    losses = train(COMPILED, tmp_path)
    for name, row in COMPILED.items():
        check(row, losses[name], losses, reference)


def test_rounding_cannot_move_a_token(reference: Plain) -> None:
    """Scores are of float32 around 0.5 to 1: what sums in another order change of them is far below 1e-5."""
    assert reference.margin > 5e-5


@pytest.mark.parametrize("override", OTHER)
def test_a_change_of_the_mathematics_is_seen(override: str, reference: Plain) -> None:
    assert plain(override).losses != pytest.approx(reference.losses, rel=2 * CLOSE)


def test_losses_are_those_of_an_earlier_day(reference: Plain) -> None:
    """If this fails and the mathematics of training was meant to change: `python -m tests.dist.golden` writes new ones."""
    golden = json.loads(GOLDEN.read_text())["losses"]
    assert reference.losses == pytest.approx(golden, rel=CLOSE)
    assert golden[-1] < 0.9 * golden[0]
