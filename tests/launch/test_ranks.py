"""How many ranks are started, and commands that do not care how many will be."""

from pathlib import Path

import pytest

from configs.loader import load_run_config
from launch import data, domain_weights, prepare
from launch._cli import run_command
from launch._ranks import largest_fit
from launch._ranks import main as print_ranks
from tests.harness import ROOT, tiny_config
from trainer.data.config import DataConfig

QUICKSTART = ROOT / "configs" / "quickstart.yaml"


def test_the_quickstart_trains_on_any_number_of_gpus() -> None:
    config = load_run_config(QUICKSTART, world_size=None)
    assert [largest_fit(config, gpus) for gpus in range(1, 10)] == [1, 2, 2, 4, 4, 4, 4, 4, 4]
    for ranks in (1, 2, 4):
        load_run_config(QUICKSTART, world_size=ranks)
    large = load_run_config(ROOT / "configs" / "16b-a3b.yaml", world_size=None)
    assert [largest_fit(large, gpus) for gpus in (4, 8, 9)] == [4, 8, 8], "eight, or none: then the training says so"


def test_the_makefile_is_told_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([str(QUICKSTART), "train.micro_batch_size=16"], ["nowhere.yaml"]):
        assert print_ranks(arguments) == 0
        assert int(capsys.readouterr().out) >= 1
    makefile = (ROOT / "Makefile").read_text()
    assert "RANKS ?= $(shell $(BIN)/python -m launch._ranks $(CONFIG) $(ARGS))" in makefile


@pytest.mark.parametrize(
    "layout",
    [
        {"engine": {"expert_parallel_size": 4, "zero_stage": 1}},
        {"engine": {"sequence_parallel_size": 2}},
        {"train": {"global_batch_size": 6, "micro_batch_size": 4}},
    ],
    ids=["experts", "sequence", "batch"],
)
def test_a_layout_for_many_ranks_can_be_prepared_and_looked_at(
    layout: dict[str, object], tmp_path: Path, data_config: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(tiny_config(tmp_path, data_config, **layout))
    assert run_command(prepare.main, [config]) == 0
    assert "already prepared" in capsys.readouterr().out
    elsewhere = f"data.path={tmp_path / 'none'}"
    for main, arguments in (
        (data.main, ["stats", config, elsewhere]),
        (domain_weights.main, [config, elsewhere, "--rule", "doge", "--out", str(tmp_path / "weights.yaml")]),
    ):
        assert run_command(main, arguments) == 2
        assert "launch.prepare" in capsys.readouterr().err, "and not that ranks are missing"
