"""Places that cannot be written to: one line and an exit code, whatever the command, and nothing is left there."""

import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from launch import health, prepare, report, reweight_lab, theory, train
from launch._cli import misplaced, run_command
from launch._new_folder import new_folder
from tests.harness import tiny_config
from trainer.data.config import DataConfig
from trainer.errors import ConfigError, StorageError
from trainer.metrics import JsonlLog

THEORY = ["--steps", "2", "--tokens", "8", "--experts", "4", "--top-k", "1"]
PLACES = ["file", "file/x", "/proc/x", "a" * 300]


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("here already")
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # an error ends a command before it does


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", ["theory", "reweight_lab", "health", "train", "prepare"])
def test_a_place_that_cannot_be_is_a_storage_error(
    command: str, place: str, tmp_path: Path, data_config: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(tiny_config(tmp_path / "c", data_config))
    mains: dict[str, tuple[Callable[[list[str]], int], list[str]]] = {
        "theory": (theory.main, [*THEORY, "--out", place]),
        "reweight_lab": (reweight_lab.main, ["--out", place]),
        "health": (health.main, [config, f"run_dir={place}"]),
        "train": (train.main, [config, f"run_dir={place}"]),
        "prepare": (prepare.main, [config, f"data.path={place}"]),
    }
    expected = 2 if (command, place) == ("prepare", "file") else 6  # which may hold what somebody wants
    assert run_command(*mains[command]) == expected
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert place[:200] in lines[0] or place.partition("/")[0] in lines[0]
    assert {path.name for path in tmp_path.iterdir()} <= {"c", "file", ".file.lock"}
    assert Path("file").read_text() == "here already"


@pytest.mark.parametrize("place", [".", "", "..", "/", "c/.."])
def test_a_new_folder_needs_a_name_of_its_own(
    place: str, tmp_path: Path, data_config: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        pytest.raises(ConfigError, match=r"--out: .* cannot be made anew; name a folder in it"),
        new_folder(Path(place)),
    ):
        pass
    for nowhere in ("file/x", "/proc/x"):
        with pytest.raises(StorageError, match=f"--out: {nowhere}: .*; name a place"), new_folder(Path(nowhere)):
            pass
    config = str(tiny_config(tmp_path / "c", data_config))
    assert run_command(prepare.main, [config, f"data.path='{place}'"]) == 2
    assert ("data.path: is empty" if not place else "cannot be made anew") in capsys.readouterr().err


@pytest.mark.parametrize("out", [".", "", "/", "folder"])
def test_a_report_is_a_file(out: str, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("run", "folder"):
        Path(folder).mkdir()
    JsonlLog(Path("run/metrics.jsonl")).append([{"step": 1, "loss": 2.0}])
    assert run_command(report.main, ["run", "--out", out]) == 2
    assert "is a folder; name a file with --out" in capsys.readouterr().err


def test_only_places_of_the_command_line_are_the_users_fault() -> None:
    def about(path: str) -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, "No such file or directory", path)

    for argv in (["--out", "a/b"], ["--out=a/b"], ["run_dir=a/b"]):
        for path in ("a", "a/b", "a/b/c.csv"):
            assert misplaced(about(path), argv) is not None, (argv, path)
        for path in ("b", "a/c", "/a/b", "."):
            assert misplaced(about(path), argv) is None, (argv, path)
    assert misplaced(about("configs/x.yaml"), ["--out", ".", "--steps", "5", ""]) is None
    assert misplaced(ValueError("a/b"), ["a/b"]) is None


def test_health_leaves_no_folder_behind(tmp_path: Path, data_config: DataConfig) -> None:
    config = str(tiny_config(tmp_path / "c", data_config, health={"enabled": True}))
    assert run_command(health.main, [config, "run_dir=hh/a"]) == 0
    assert not Path("hh").exists()
    assert not torch.distributed.is_initialized()
    Path("hh").mkdir()
    assert run_command(health.main, [config, "run_dir=hh/a"]) == 0
    assert list(Path("hh").iterdir()) == []
