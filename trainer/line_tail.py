"""Follow a file of lines that another process writes, through restarts that cut or replace it."""

import os
from pathlib import Path

_REMEMBERED = 512  # bytes before the end of what was read, to see that they are still the same
_BLOCK_BYTES = 1 << 20


class LineTail:
    """Gives complete lines as they come; a half-written last line waits until it is whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._forget()

    def _forget(self) -> None:
        self._inode, self._offset, self._end, self._half = -1, 0, b"", b""

    def poll(self) -> tuple[list[str], bool]:
        """The next complete lines, and whether the file is another one than before, so that they begin anew.

        At most about a MiB of lines, or a single one that is longer: whoever wants all asks until there are none.
        A file that is missing gives nothing.
        """
        began_anew = False
        try:
            with self._path.open("rb") as file:
                began_anew = self._offset > 0 and not self._goes_on(file.fileno())
                if began_anew:
                    self._forget()
                self._inode = os.fstat(file.fileno()).st_ino
                file.seek(self._offset)
                while block := file.read(_BLOCK_BYTES):
                    self._offset += len(block)
                    self._end = (self._end + block)[-_REMEMBERED:]
                    self._half += block
                    if b"\n" in block:
                        break
        except OSError:
            return [], began_anew
        *lines, self._half = self._half.split(b"\n")
        return [line.decode(errors="replace") for line in lines], began_anew

    def _goes_on(self, descriptor: int) -> bool:
        """Whether the open file still begins with what was read of it."""
        status = os.fstat(descriptor)
        if status.st_ino != self._inode or status.st_size < self._offset:
            return False
        return os.pread(descriptor, len(self._end), self._offset - len(self._end)) == self._end
