"""A file that others read is replaced at once, or stays as it was."""

import os
from pathlib import Path


def replace_file(path: Path, text: str) -> None:
    """Write `text` beside `path` and put it in its place; makes the folder. Raises OSError."""
    staging = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    staging.write_text(text)
    os.replace(staging, path)
