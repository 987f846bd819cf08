"""Where a step would wait for a GPU, seen on a CPU: operations whose result the host needs before it can go on."""

import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[1]
aten = torch.ops.aten

# Their results are Python numbers, or have a size that only the device knows.
WAITING = {
    aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten.bincount, aten.unique_dim,
    aten._unique2, aten.unique_consecutive,
}  # fmt: skip
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class DeviceWaits(TorchDispatchMode):
    """Collects the places, as file:line of this repository, that would make the host wait if tensors were on a GPU.

    Not seen is what libraries wait for explicitly (streams, events).
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __enter__(self) -> "DeviceWaits":
        self._patches = ExitStack()
        for name in ("tolist", "cpu"):  # on a CPU these are no operations
            self._patches.enter_context(patch.object(Tensor, name, self._seen(Tensor, name, lambda *_, **__: True)))
        for name in ("tensor", "as_tensor"):  # numbers of the host, which a copy to a device waits with
            self._patches.enter_context(patch.object(torch, name, self._seen(torch, name, _is_copied)))
        super().__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        self._patches.close()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = function.overloadpacket
        by_mask = packet in INDEXING and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        unknown_size = packet is aten.repeat_interleave and "output_size" not in (kwargs or {})
        if packet in WAITING or by_mask or unknown_size:
            self.places.append(f"{_place()} {packet}")
        return function(*args, **(kwargs or {}))

    def _seen(self, owner: Any, name: str, waits: Callable[..., bool]) -> Any:
        original = getattr(owner, name)

        def function(*arguments: Any, **options: Any) -> Any:
            if waits(*arguments, **options):
                self.places.append(f"{_place()} {name}")
            return original(*arguments, **options)

        return function


def _is_copied(data: Any, *, device: torch.device | None = None, **_: Any) -> bool:
    return device is not None and not isinstance(data, Tensor)


def _place() -> str:
    paths = [
        (Path(frame.filename).relative_to(ROOT), frame.lineno)
        for frame in traceback.extract_stack()
        if Path(frame.filename).is_relative_to(ROOT)
    ]
    here = [
        (path, line) for path, line in paths if not path.parts[0].startswith(".")
    ]  # what is installed may lie there
    tested = [(path, line) for path, line in here if path.parts[0] != "tests"]
    path, line = (tested or here)[-1]
    return f"{path}:{line}"
