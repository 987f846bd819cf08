"""Folders of safetensors, read tensor by tensor and written in shards, and the hashes that vouch for them."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer import ranks
from trainer.errors import CheckpointError, ConfigError, StorageError
from trainer.tensor_files import save_tensors

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MANIFEST = "MANIFEST.json"
_SIZES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


class TensorFolder:
    """The tensors of a file, or of a folder with one or with shards and an index; read one by one when asked for."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError if there are no safetensors, CheckpointError if they cannot be read."""
        self._path = path
        self._files: dict[str, Any] = {}
        try:
            for file in _weight_files(path):
                handle = safe_open(file, framework="pt")
                self._files |= dict.fromkeys(handle.keys(), handle)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: weights cannot be read ({error}); copy the folder again") from error

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return tuple(self._handle(name).get_slice(name).get_shape())

    def read(self, name: str, index: int | slice | None = None) -> Tensor:
        """A tensor, or what `index` takes of its first dimension.

        Raises CheckpointError if there is none of that name.
        """
        handle = self._handle(name)
        tensor: Tensor = handle.get_tensor(name) if index is None else handle.get_slice(name)[index]
        return tensor

    def _handle(self, name: str) -> Any:
        if name not in self._files:
            raise CheckpointError(f"{self._path}: has no tensor {name}; the folder is incomplete or of another model")
        return self._files[name]


class ShardWriter:
    """Writes tensors one after the other into files of at most about `shard_bytes`, with an index if there are several.

    A shard is in memory until it is full; the folder is complete when the context ends without an error.
    """

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._folder, self._limit = folder, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = self._total_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; it must not be changed afterwards."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._limit:
            self._flush()
        tensor = tensor.contiguous()
        # A view would keep, and share in the file, the whole that it was cut from.
        self._pending[name] = tensor if tensor.untyped_storage().nbytes() == size else tensor.clone()
        self._pending_bytes += size
        self._total_bytes += size

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            return
        self._flush()
        if len(self._shards) == 1:
            self._part(0).rename(self._folder / WEIGHTS)
            return
        total = len(self._shards)
        names = [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
        for i, name in enumerate(names):
            self._part(i).rename(self._folder / name)
        placed = {tensor: name for name, tensors in zip(names, self._shards, strict=True) for tensor in tensors}
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(placed.items()))}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number:05d}.safetensors"

    def _flush(self) -> None:
        path = self._part(len(self._shards))
        try:
            save_tensors(self._pending, path, {"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise StorageError(f"{path}: cannot be written ({error}); free space and start again") from error
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0


def parse_size(text: str) -> int:
    """Bytes of a size such as 500MB or 5GB. Raises ConfigError if it is none."""
    found = re.fullmatch(r"(\d+)([KMG]?)B?", text.strip().upper())
    if found is None or not int(found[1]):
        raise ConfigError(f"--shard-size: '{text}' is no size such as 500MB or 5GB")
    return int(found[1]) * _SIZES[found[2]]


def file_entry(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file, as manifests have them."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def read_manifest(folder: Path) -> Mapping[str, Any]:
    """The manifest of a checkpoint or of a folder of initial weights.

    Raises CheckpointError if it is missing or unreadable.
    """
    try:
        manifest: Mapping[str, Any] = json.loads((folder / MANIFEST).read_text())
        if isinstance(manifest["files"], dict) and isinstance(manifest["identity"], dict):
            return manifest
        problem = "is of another format"
    except (FileNotFoundError, NotADirectoryError):
        problem = "is missing: give a folder that launch.from_hf wrote, or a checkpoint"
    except (ValueError, KeyError, TypeError, OSError):
        problem = "is unreadable"
    raise CheckpointError(f"{folder / MANIFEST} {problem}")


def verify_weights(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Hash the safetensors of a model and compare with the manifest; ranks share the work and agree.

    Raises CheckpointError that names the first file that differs.
    """
    names = sorted(name for name in manifest["files"] if name in (WEIGHTS, INDEX) or name.startswith("model-"))
    complaint = None if names else f"{MANIFEST} names no {WEIGHTS}"
    for name in names[ranks.rank() :: ranks.world_size()]:
        path = folder / name
        if not path.is_file():
            complaint = f"{name} is missing"
        elif file_entry(path) != manifest["files"][name]:
            complaint = f"{name} does not have the size and hash in the manifest"
    complaints = [line for line in ranks.gather_objects(complaint) if line]
    if complaints:
        raise CheckpointError(f"{folder}: {complaints[0]}; copy the folder again or name another")


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / INDEX).is_file():
        try:
            named = set(json.loads((path / INDEX).read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{path / INDEX} is unreadable; copy the folder again") from None
        if any(Path(name).name != name for name in named):
            raise CheckpointError(f"{path / INDEX} names files outside its folder")
        return [path / name for name in sorted(named)]
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    pickles = [*path.glob("*.bin"), *path.glob("*.pth"), *path.glob("*.pt")]
    hint = f"; {pickles[0].name} is a pickle, which could run code: convert it to safetensors" if pickles else ""
    raise ConfigError(f"{path}: has no {WEIGHTS}{hint}")
