"""How often the host waits for a CUDA device: waits that an operation implies, and those that somebody asks for."""

import warnings
from contextlib import ExitStack
from types import TracebackType
from typing import Any
from unittest.mock import patch

import torch

_EXPLICIT = ((torch.cuda, "synchronize"), (torch.cuda.Stream, "synchronize"), (torch.cuda.Event, "synchronize"))


class HostSyncs:
    """`with HostSyncs() as syncs:` counts on CUDA; elsewhere there is nothing to wait for, and it stays at 0."""

    def __init__(self) -> None:
        self.implied = 0
        """Waits of operations: `.item()`, copies to the host, sizes that only the device knows."""
        self.explicit = 0
        """Calls of `synchronize` on the device, a stream or an event."""

    @property
    def count(self) -> int:
        """Both together."""
        return self.implied + self.explicit

    def __enter__(self) -> "HostSyncs":
        self._stack = ExitStack()
        self._caught = self._stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        for owner, name in _EXPLICIT:
            self._stack.enter_context(patch.object(owner, name, self._counted(getattr(owner, name))))
        if torch.cuda.is_available():
            self._stack.callback(torch.cuda.set_sync_debug_mode, torch.cuda.get_sync_debug_mode())
            torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        caught = list(self._caught)
        self._stack.close()
        for warning in caught:
            if "synchronizing CUDA operation" in str(warning.message):
                self.implied += 1
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)

    def _counted(self, original: Any) -> Any:
        def synchronize(*arguments: Any, **options: Any) -> Any:
            self.explicit += 1
            # What it does inside is this one wait, not a further one.
            return original(*arguments, **options)

        return synchronize
