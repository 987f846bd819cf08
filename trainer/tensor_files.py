"""Files of tensors: safetensors, readable for whoever may read the folder they are in."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. Raises OSError.

    The library makes files that their owner alone may read, which a team that shares runs cannot use. A folder has been
    made under the user's umask, and so says what a file in it should allow.
    """
    save_file(dict(tensors), path, metadata)
    path.chmod(path.parent.stat().st_mode & 0o666)
