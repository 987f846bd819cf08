"""What dryrun says of the engine: each choice with its value and why, and what was configured as that."""

import re
from pathlib import Path

import pytest

from launch import dryrun
from launch._cli import run_command
from tests.harness import tiny_config
from trainer.data.config import DataConfig
from trainer.engine_choices import ALONE, LEAST


def engine_table(output: str) -> dict[str, tuple[str, str]]:
    """Value and reason of each row of the table that is called engine."""
    lines = output[output.index("engine (DeepSpeed") :].splitlines()
    rows: dict[str, tuple[str, str]] = {}
    for line in lines:
        if re.search(r"\bbatch\b", line):
            break
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if len(cells) == 3:
            rows[cells[0]] = (cells[1], cells[2])
    return rows


def test_every_choice_is_explained(
    tmp_path: Path, data_config: DataConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    config = str(tiny_config(tmp_path, data_config, engine={"zero_stage": 1}))
    tables = []
    for arguments in (
        ["--world-size", "1"],
        ["--world-size", "2"],
        ["--world-size", "2", "engine.bucket_elements=777", "engine.zero_options.overlap_comm=true"],
        ["--world-size", "2", "engine.zero_stage=0"],
    ):
        assert run_command(dryrun.main, [config, *arguments]) == 0
        tables.append(engine_table(capsys.readouterr().out))
    alone, two, configured, whole = tables
    assert alone["bucket_elements"][0] == f"{ALONE:,}"
    assert two["bucket_elements"][0] == f"{LEAST:,}"
    assert alone["bucket_elements"][1] != two["bucket_elements"][1]
    assert two["zero_options.overlap_comm"][0] == "false"
    assert configured["bucket_elements"] == ("777", "as configured")
    assert configured["zero_options.overlap_comm"] == ("true", "as configured")
    assert "bucket_elements" not in whole
    assert whole["reduced at once"] == ("500,000,000", "fixed by DeepSpeed at zero_stage 0")
    assert all(why for table in tables for _, why in table.values())
