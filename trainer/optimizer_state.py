"""Adam's numbers on disk, parameter by parameter, whatever a run has cut them into.

A fragment is a run of consecutive elements of one flattened parameter, counted in the whole model: experts that are
spread over ranks are parts of one stack. Each rank writes the fragments it owns, and an index says which file holds
what. A rank of any other layout (ranks, ZeRO stage, expert parallelism) reads the elements it needs from the files that
have them. Values are copied, never computed with, so going from one layout to another and back loses nothing.

    optimizer-00000.safetensors    of each rank: {weight, exp_avg, exp_avg_sq}/<first element>/<parameter>
    optimizer.json                 Adam's clock, and for each parameter its size and [first, end, file] of its fragments
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.errors import CheckpointError
from trainer.tensor_files import save_tensors

INDEX = "optimizer.json"
KINDS = ("weight", "exp_avg", "exp_avg_sq")

Spans = Mapping[str, Sequence[tuple[int, int, str]]]
"""For each parameter, [first, end) of its fragments and where each of them is."""


class Fragment(NamedTuple):
    """Elements [start, start + n) of a flattened parameter of `size` elements."""

    name: str
    size: int
    start: int
    weight: Tensor  # float32 [n], like the two moments: views of what the optimizer works on
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + len(self.weight)

    def on_host(self) -> "Fragment":
        """A copy that shares no memory with the optimizer."""
        tensors = (getattr(self, kind).to("cpu", copy=True) for kind in KINDS)
        return Fragment(self.name, self.size, self.start, *tensors)

    def share(self, rank: int, ranks: int) -> "Fragment":
        """The part that `rank` of several owners of the same fragment has to write; the parts make up the whole."""
        cuts = [len(self.weight) * each // ranks for each in (rank, rank + 1)]
        tensors = (tensor[cuts[0] : cuts[1]] for tensor in (self.weight, self.exp_avg, self.exp_avg_sq))
        return Fragment(self.name, self.size, self.start + cuts[0], *tensors)


def fragments_file(rank: int) -> str:
    """The file of a rank's fragments."""
    return f"optimizer-{rank:05d}.safetensors"


def write_fragments(folder: Path, rank: int, fragments: Iterable[Fragment]) -> dict[str, list[tuple[int, int, str]]]:
    """Write a rank's fragments, none of them empty, into `folder`; returns their spans, for the index."""
    file = fragments_file(rank)
    tensors: dict[str, Tensor] = {}
    spans: dict[str, list[tuple[int, int, str]]] = {}
    for fragment in fragments:
        spans.setdefault(fragment.name, []).append((fragment.start, fragment.stop, file))
        tensors |= {_key(kind, fragment): getattr(fragment, kind) for kind in KINDS}
    save_tensors(tensors, folder / file)
    return spans


def write_index(folder: Path, spans: Iterable[Spans], sizes: Mapping[str, int], clock: float) -> None:
    """Write what all ranks together have written. `clock`: steps Adam has taken."""
    together: dict[str, dict[str, Any]] = {name: {"size": size, "fragments": []} for name, size in sizes.items()}
    for part in spans:
        for name, found in part.items():
            together[name]["fragments"] += found
    (folder / INDEX).write_text(json.dumps({"clock": clock, "parameters": together}))


def read_fragments(folder: Path, fragments: Iterable[Fragment]) -> float:
    """Fill the fragments with what `folder` holds of their elements; returns Adam's clock.

    Raises CheckpointError that names the first parameter that is missing, of another size or not whole.
    """
    index = json.loads((folder / INDEX).read_text())
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for fragment in fragments:
            saved = index["parameters"].get(fragment.name)
            if saved is None or saved["size"] != fragment.size:
                found = "nothing" if saved is None else f"{saved['size']} elements"
                raise CheckpointError(
                    f"{folder / INDEX}: {found} for {fragment.name}, the model has {fragment.size}; "
                    "it was saved by a model of another shape"
                )
            for file, first, begin, end in overlaps(fragment.start, fragment.stop, saved["fragments"], fragment.name):
                try:
                    if file not in files:
                        files[file] = stack.enter_context(safe_open(folder / file, framework="pt"))
                    for kind in KINDS:
                        source = files[file].get_slice(f"{kind}/{first}/{fragment.name}")
                        target = getattr(fragment, kind)[begin - fragment.start : end - fragment.start]
                        target.copy_(source[begin - first : end - first])
                except (OSError, SafetensorError) as error:
                    raise CheckpointError(f"{folder / file}: {fragment.name} cannot be read ({error})") from error
    return float(index["clock"])


def overlaps(
    start: int, stop: int, saved: Iterable[tuple[int, int, str]], name: str
) -> Iterator[tuple[str, int, int, int]]:
    """Where elements [start, stop) are found: (file, first element of its fragment, begin, end), in order.

    Raises CheckpointError if there is a gap.
    """
    at = start
    for first, end, file in sorted(saved):
        if end <= at or first >= stop:
            continue
        if first > at:
            break
        yield file, first, at, min(end, stop)
        at = min(end, stop)
    if at < stop:
        raise CheckpointError(
            f"optimizer state of {name} has no elements {at} to {stop - 1}; the checkpoint is not whole"
        )


def _key(kind: str, fragment: Fragment) -> str:
    return f"{kind}/{fragment.start}/{fragment.name}"
