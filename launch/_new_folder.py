"""Folders that are whole or do not exist."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import ConfigError, StorageError


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write into; it takes the target's name when the context ends without an error.

    Raises ConfigError if `target` exists and is not an empty folder, or has no name that a new folder could take;
    StorageError if it cannot be made.
    """
    if target.name in ("", ".."):
        raise ConfigError(f"--out: {target} cannot be made anew; name a folder in it")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"--out: {target} exists and is not empty; remove it or name another folder")
    staging = target.with_name(f".{target.name}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
    except OSError as error:
        raise StorageError(f"--out: {target}: {error.strerror}; name a place that can be written to") from error
    try:
        yield staging
        os.replace(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
