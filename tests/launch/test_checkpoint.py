"""`launch.checkpoint` says what a run has, and which of it can be trusted; damaged ones are in nobody's way."""

import logging
import re
import shutil
from pathlib import Path

import pytest

from launch import data as data_command
from launch.checkpoint import main
from tests.harness import run_trainings, tiny_config
from trainer.data.config import DataConfig
from trainer.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, data_config: DataConfig) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    run_trainings([(tiny_config(folder, data_config), [])], ranks=1)
    return folder / "run"


@pytest.fixture
def copied(run_dir: Path, tmp_path: Path) -> Path:
    """The run in a folder of its own: checkpoints of steps 8 and 12."""
    shutil.copytree(run_dir, tmp_path / "run")
    return tmp_path / "run"


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def steps_of(run_dir: Path) -> list[str]:
    return sorted(path.name.removeprefix("step-").lstrip("0") for path in (run_dir / "checkpoints").iterdir())


def test_damaged_ones_are_not_counted_among_those_kept(run_dir: Path, copied: Path) -> None:
    config, aside = run_dir.parent / "config.yaml", checkpoint(copied, 3)
    shutil.copytree(checkpoint(copied, 8), aside.with_name(f"{aside.name}.mine"))
    flip_a_bit(checkpoint(copied, 12) / "optimizer-00000.safetensors")
    own = [f"run_dir={copied}", "checkpoint.keep=2", "checkpoint.every=10"]
    run_trainings([(config, [*own, "train.steps=11"])], ranks=1)
    assert "resumed from step 8" in (copied / "log.txt").read_text()
    assert steps_of(copied) == ["10", "11", "12", "3.mine"], "two good ones, and what the run has not come to again"
    run_trainings([(config, [*own, "train.steps=14"])], ranks=1)
    assert "resumed from step 11" in (copied / "log.txt").read_text()
    assert steps_of(copied) == ["11", "14", "3.mine"], "the damaged one is in the past, and goes"
    assert main(["verify", str(copied)]) == 0


def test_a_damaged_one_does_not_keep_anybody_from_the_data(
    copied: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def first_shown() -> str:
        assert data_command.main(["show", str(copied), "--count", "1"]) == 0
        found = re.search(r"sample (\d+) ·", capsys.readouterr().out)
        assert found
        return found[1]

    assert first_shown() == str(12 * 8)
    assert not caplog.records
    flip_a_bit(checkpoint(copied, 12) / "state.json")
    with caplog.at_level(logging.WARNING, "evenkeel"):
        assert first_shown() == str(8 * 8), "the next one is that of step 8"
    (record,) = caplog.records
    assert re.search(r"step-00000012: state\.json does not have the hash .*; looking at the one before", record.message)
    (checkpoint(copied, 8) / "optimizer-00000.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"step-00000012: state.*/step-00000008: optimizer-00000\.safetensors is missing"
    ):
        first_shown()


def test_ls_and_verify(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", str(copied)]) == 0
    listed = capsys.readouterr().out
    assert "files are there" in listed
    assert main(["verify", str(copied), "--step", "12"]) == 0
    assert "whole" in capsys.readouterr().out

    flip_a_bit(checkpoint(copied, 8) / "optimizer-00000.safetensors")
    assert main(["ls", str(copied)]) == 0, "a flipped bit is not seen without reading"
    with pytest.raises(CheckpointError, match=r"step-00000008: optimizer-00000\.safetensors does not have"):
        main(["verify", str(copied)])
    assert main(["verify", str(copied), "--step", "12"]) == 0


def test_tensors_are_as_readable_as_the_files_beside_them(run_dir: Path) -> None:
    (folder,) = (run_dir / "checkpoints").glob("step-*12")
    assert len({path.stat().st_mode for path in folder.iterdir() if path.is_file()}) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["ls", "no/such/run"], ConfigError, "is not a run folder"),
        (["ls", "."], CheckpointError, "has no checkpoint"),
        (["convert", ".", "--zero-stage", "3"], ConfigError, r"need no conversion, .*launch.train .*launch.export"),
        (["verify", ".", "--step", "7"], CheckpointError, "has no checkpoint of step 7"),
    ],
)
def test_nothing_to_look_at(arguments: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        main(arguments)
