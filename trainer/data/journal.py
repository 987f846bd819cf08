"""What an interrupted preparation had finished: one line for each part and each stream that was read to its end."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from trainer.data.parts import Part


class Journal:
    """Lines are appended as work is done; a line torn by a kill, and all after it, do not count."""

    def __init__(self, path: Path, key: str) -> None:
        """Open the journal, or begin a new one if what is there was written under another `key`.

        Raises OSError.
        """
        self.parts: dict[tuple[int, int], Part] = {}
        self._streams: dict[int, tuple[str, int]] = {}
        header = json.dumps({"key": key})
        lines = path.read_text(errors="replace").split("\n")[:-1] if path.exists() else []
        good = [header]
        if lines[:1] == [header]:
            good += _taken_while(lines[1:], self._take)
        path.write_text("".join(f"{line}\n" for line in good))
        self._file: TextIO = path.open("a")

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add_part(self, part: Part) -> None:
        """A part was finished, perhaps again."""
        self.parts[part.stream, part.number] = part
        self._append(part.to_json())

    def add_stream(self, stream: int, identity: str, num_parts: int) -> None:
        """A stream was read to its end and has this many parts."""
        self._append(json.dumps({"stream": stream, "identity": identity, "parts": num_parts}))

    def finished(self, stream: int, identity: str) -> list[Part] | None:
        """All parts of a stream that need not be read again; None if something is missing or it may have changed."""
        known, num_parts = self._streams.get(stream, ("", 0))
        if not identity or known != identity:
            return None
        parts = [self.parts.get((stream, number)) for number in range(num_parts)]
        return None if None in parts else [part for part in parts if part is not None]

    def _append(self, line: str) -> None:
        self._file.write(f"{line}\n")
        self._file.flush()

    def _take(self, line: str) -> bool:
        try:
            values = json.loads(line)
            if "parts" in values:
                self._streams[int(values["stream"])] = (str(values["identity"]), int(values["parts"]))
            else:
                part = Part.from_json(line)
                self.parts[part.stream, part.number] = part
        except (ValueError, KeyError, TypeError):
            return False
        return True


def _taken_while(lines: list[str], take: Callable[[str], bool]) -> list[str]:
    for index, line in enumerate(lines):
        if not take(line):
            return lines[:index]
    return lines


def num_finished(path: Path) -> int:
    """How many parts a journal speaks of; 0 if there is none."""
    try:
        return sum('"input_digest"' in line for line in path.read_text(errors="replace").splitlines())
    except OSError:
        return 0
