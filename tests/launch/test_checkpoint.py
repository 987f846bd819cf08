"""`launch.checkpoint` says what a run has, and which of it can be trusted."""

from pathlib import Path

import pytest

from launch.checkpoint import main
from tests.harness import run_trainings, tiny_config
from trainer.data.config import DataConfig
from trainer.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, data_config: DataConfig) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    run_trainings([(tiny_config(folder, data_config), [])], ranks=1)
    return folder / "run"


def test_ls_and_verify(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", str(run_dir)]) == 0
    listed = capsys.readouterr().out
    assert "files are there" in listed
    assert main(["verify", str(run_dir), "--step", "12"]) == 0
    assert "whole" in capsys.readouterr().out

    weights = run_dir / "checkpoints" / "step-00000008" / "optimizer-00000.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert main(["ls", str(run_dir)]) == 0, "a flipped bit is not seen without reading"
    with pytest.raises(CheckpointError, match=r"step-00000008: optimizer-00000\.safetensors does not have"):
        main(["verify", str(run_dir)])
    assert main(["verify", str(run_dir), "--step", "12"]) == 0


def test_tensors_are_as_readable_as_the_files_beside_them(run_dir: Path) -> None:
    (folder,) = (run_dir / "checkpoints").glob("step-*12")
    assert len({path.stat().st_mode for path in folder.iterdir() if path.is_file()}) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["ls", "no/such/run"], ConfigError, "is not a run folder"),
        (["ls", "."], CheckpointError, "has no checkpoint"),
        (["verify", ".", "--step", "7"], CheckpointError, "has no checkpoint of step 7"),
    ],
)
def test_nothing_to_look_at(arguments: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        main(arguments)
