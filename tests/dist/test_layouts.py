"""Every layout trains the same model: the matrix of trainer/LAYOUTS.md, and a part of it on two ranks by default."""

import os
from pathlib import Path

import pytest

from configs.loader import load_run_config
from launch._corpus import open_corpus
from tests.dist.layouts import (
    LAYOUTS,
    LIMITS,
    NOT_MEASURED,
    RANKS,
    VARIANTS,
    Difference,
    Layout,
    difference,
    read_page,
    write_page,
    wrong_biases,
)
from tests.dist.reference import Reference, train_reference
from tests.harness import run_trainings, tiny_config
from trainer.data.config import DataConfig

# Two ranks, each value of each setting, and the pairs that share code: (layout, precision, recompute).
FEW = {
    f"{layout.name}, {precision}{', recomputed' if recompute else ''}": (layout, precision, recompute)
    for layout, precision, recompute in [
        (Layout(0, 1, 2, False), "fp32", True),
        (Layout(1, 1, 2, True), "fp32", False),
        (Layout(1, 2, 1, True), "fp32", True),
        (Layout(2, 2, 2, False), "fp32", True),
        (Layout(2, 2, 1, True), "fp32", False),
        (Layout(3, 1, 1, True), "fp32", True),
        (Layout(3, 1, 2, False), "fp32", False),
        (Layout(0, 1, 1, False), "bf16", False),
        (Layout(1, 2, 2, False), "bf16", True),
        (Layout(1, 1, 1, True), "bf16", False),
        (Layout(2, 2, 2, True), "bf16", False),
        (Layout(3, 1, 2, True), "bf16", True),
    ]
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, data_config: DataConfig) -> Path:
    return tiny_config(
        tmp_path_factory.mktemp("layouts"), data_config,
        train={"steps": 10}, checkpoint={"every": 0}, evaluation={"every": 0, "max_rows": 1},
        hooks={"expert_bias": {"rule": "sign", "rate": 0.01, "gap_tokens": 0}},
    )  # fmt: skip


@pytest.fixture(scope="module")
def reference(config: Path) -> Reference:
    loaded = load_run_config(config)
    return train_reference(loaded, open_corpus(loaded))


@pytest.fixture(scope="module")
def few(config: Path) -> Path:
    plan = [
        (config, [*layout.overrides(precision=p, recompute=r, ranks=2), f"run_dir={config.parent / name}"])
        for name, (layout, p, r) in FEW.items()
    ]
    run_trainings(plan, ranks=2)
    return config.parent


def check(run_dir: Path, precision: str, reference: Reference) -> Difference:
    found = difference(run_dir, reference, precision)
    assert found.within(LIMITS[precision]), found
    if precision == "fp32":
        assert wrong_biases(run_dir, reference) <= 2
    return found


@pytest.mark.parametrize("name", FEW)
def test_two_ranks_train_the_model_of_one_process(name: str, few: Path, reference: Reference) -> None:
    check(few / name, FEW[name][1], reference)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", [each for each in LAYOUTS if each.has_engine], ids=lambda layout: layout.name)
def test_layout(layout: Layout, config: Path, reference: Reference) -> None:
    """On four ranks, in every variant; `make layouts` writes what it finds into the page."""
    folders = {variant: config.parent / f"{layout.name} {variant}" for variant in VARIANTS}
    plan = [
        (config, [*layout.overrides(precision=p, recompute=r), f"run_dir={folder}"])
        for (p, r), folder in folders.items()
    ]
    run_trainings(plan, ranks=RANKS)
    found: dict[str, Difference] = {}
    for (precision, _), folder in folders.items():
        one = check(folder, precision, reference)
        found[precision] = one.most(found.get(precision, one))
    if os.environ.get("WRITE_LAYOUTS"):
        write_page(layout, found, config)


def test_the_page_has_every_layout_and_the_words_of_the_config(config: Path) -> None:
    page = read_page()
    assert list(page) == [layout.name for layout in LAYOUTS]
    for layout in LAYOUTS:
        refusal, cells = layout.refusal(config), page[layout.name]
        assert layout.has_engine == (not refusal), "what is not refused is trained by the matrix"
        if refusal:
            assert cells[0] == f"refused: {refusal}", layout.name
        elif cells[0] != NOT_MEASURED:
            figures = [float(cell) for cell in cells]
            assert Difference(*figures[:3]).within(LIMITS["fp32"]), layout.name
            assert Difference(*figures[3:]).within(LIMITS["bf16"]), layout.name
