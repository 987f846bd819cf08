"""What is wrong with a checkpoint is noticed before anything of it is used, and said."""

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.dist.test_resume import assert_same_run
from tests.faults.faultkit import Job, Record, Reference, checkpoints, digests
from tests.harness import deterministic, run_trainings


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = ("model.safetensors", "optimizer-00001.safetensors", "state.json")
DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    **{f"{file} truncated": (file, truncate, f"{file} has") for file in FILES},
    **{f"{file} flipped": (file, flip_a_bit, f"{file} does not have the hash") for file in FILES},
    **{f"{file} missing": (file, Path.unlink, f"{file} is missing") for file in FILES},
    "manifest garbage": ("MANIFEST.json", lambda path: path.write_bytes(b"\x00{"), "MANIFEST.json is unreadable"),
    "manifest empty": ("MANIFEST.json", lambda path: path.write_text("{}"), "MANIFEST.json is unreadable"),
    "manifest missing": ("MANIFEST.json", Path.unlink, "MANIFEST.json is missing"),
    "a number changed in the manifest": (
        "MANIFEST.json", lambda path: path.write_text(path.read_text().replace('"sha256": "', '"sha256": "0')),
        "hooks.safetensors does not have the hash",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def resumed(two_ranks: Reference) -> Path:
    """For each damage a copy of the finished run whose newest checkpoint has it, trained on by two ranks."""
    folder = two_ranks.config.parent / "damaged"
    for name, (file, damage, _) in DAMAGES.items():
        shutil.copytree(two_ranks.run_dir, folder / name)
        damage(folder / name / "checkpoints" / f"step-{checkpoints(two_ranks.run_dir)[-1]:08d}" / file)
    run_trainings([(two_ranks.config, [f"run_dir={folder / name}"]) for name in DAMAGES], ranks=2)
    return folder


@pytest.mark.fault(6, "newest checkpoint damaged")
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    name: str, resumed: Path, two_ranks: Reference, record_property: Record
) -> None:
    *_, older, newest = checkpoints(two_ranks.run_dir)
    record_property("steps_lost", newest - older)
    log = (resumed / name / "log.txt").read_text()
    assert f"step-{newest:08d}: {DAMAGES[name][2]}" in log, "what is wrong is named"
    assert f"resumed from step {older}" in log
    assert_same_run(resumed / name, two_ranks.run_dir)


def copy_of(reference: Reference, name: str) -> Path:
    run_dir = reference.config.parent / name
    shutil.copytree(reference.run_dir, run_dir)
    return run_dir


@pytest.mark.slow
@pytest.mark.fault(7, "every checkpoint damaged")
def test_no_intact_checkpoint_is_exit_3_and_nothing_is_trained(one_rank: Reference) -> None:
    run_dir = copy_of(one_rank, "all damaged")
    for folder in (run_dir / "checkpoints").iterdir():
        flip_a_bit(folder / "state.json")
    before, metrics, config = digests(run_dir), deterministic(run_dir), (run_dir / "config.yaml").read_bytes()
    job = Job(one_rank.config, run_dir, "train.steps=20", ranks=0)
    assert job.end() == 3
    assert all(f"step-{step:08d}" in job.errors[-1] for step in before), "a reason for each"
    assert (digests(run_dir), deterministic(run_dir)) == (before, metrics)
    assert (run_dir / "config.yaml").read_bytes() == config


class Malicious:
    """Runs code when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self._sentinel = sentinel

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self._sentinel,)


@pytest.mark.slow
@pytest.mark.fault(25, "malicious pickle in place of weights, manifest forged")
def test_a_pickle_is_never_opened(one_rank: Reference, tmp_path: Path) -> None:
    sentinel = tmp_path / "opened"
    pickle.loads(pickle.dumps(Malicious(sentinel)))
    assert sentinel.exists(), "the pickle works"
    sentinel.unlink()

    evil = pickle.dumps(Malicious(sentinel))
    for file in ("model.safetensors", "hooks.safetensors", "optimizer-00000.safetensors", "rng-00000.safetensors"):
        run_dir = copy_of(one_rank, f"pickle in {file}")
        for folder in (run_dir / "checkpoints").iterdir():
            (folder / "pytorch_model.bin").write_bytes(evil)
            (folder / file).write_bytes(evil)
            manifest = json.loads((folder / "MANIFEST.json").read_text())
            manifest["files"][file] = {"size": len(evil), "sha256": hashlib.sha256(evil).hexdigest()}
            (folder / "MANIFEST.json").write_text(json.dumps(manifest))
        job = Job(one_rank.config, run_dir, "train.steps=20", ranks=0)
        assert job.end() == 3, job.log[-2000:]
        assert file in job.errors[-1]
        assert not sentinel.exists()


@pytest.mark.slow
@pytest.mark.fault(25, "checkpoint of another format")
def test_another_format_is_exit_3(one_rank: Reference) -> None:
    run_dir = copy_of(one_rank, "format")
    for folder in (run_dir / "checkpoints").iterdir():
        manifest = json.loads((folder / "MANIFEST.json").read_text())
        (folder / "MANIFEST.json").write_text(json.dumps(manifest | {"format": 1}))
    job = Job(one_rank.config, run_dir, ranks=0)
    assert job.end() == 3
    assert "format 1, this code reads format" in job.errors[-1]
