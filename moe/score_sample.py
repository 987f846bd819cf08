"""A sample of tokens with their router scores, taken while a model evaluates; and a file of such scores.

Decisions:
- Which tokens are in the sample depends on the text alone: each token has a key, a hash of its sequence and position,
  and the smallest keys win. So it is drawn evenly, needs no random generator, and comes out the same however the
  held-out rows are dealt to ranks and batches.
- It watches through torch's own module hooks, in evaluation mode only: training runs nothing of it.
- Merging over ranks moves keys first and then the winners' scores only.

A file of recorded scores is a safetensors file with a tensor `scores.<i>` for each MoE layer i: float32 [tokens,
experts of that layer], what the router's score function gave, before any bias, a row for each token, the same tokens in
every layer. Its metadata has `format` (this version), `top_k`, and `source`, which says where it came from.

Shape letters: B samples, T sequence, N tokens of a forward, S tokens of the sample, E experts of a layer, W ranks.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor, nn

from moe.sequence_parallel import Shards
from trainer import ranks
from trainer.errors import ConfigError, StorageError
from trainer.tensor_files import save_tensors

IGNORED_LABEL = -100
FORMAT = "evenkeel-router-scores-1"

_NO_TOKEN = torch.iinfo(torch.int64).max


def token_keys(tokens_BT: Tensor, counted_BT: Tensor) -> Tensor:
    """A hash of each token's sequence and position, int64 [B, T], not negative; padding gets the largest value.

    Integer arithmetic modulo 2^64 with odd constants and xor-shifts (after Steele et al. 2014, SplitMix64).
    """
    position_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    row_B1 = ((tokens_BT + 1) * _mix(position_T + 1)).sum(dim=1, keepdim=True)
    return torch.where(counted_BT, _mix(_mix(row_B1) + position_T) & _NO_TOKEN, _NO_TOKEN)


def _mix(x: Tensor) -> Tensor:
    # int64 shifts keep the sign; as a hash that does no harm.
    x = (x ^ (x >> 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ (x >> 31)


class ScoreSample:
    """Keeps the scores of at most `size` tokens of all that a model forwards in evaluation mode."""

    def __init__(self, model: nn.Module, routers: Sequence[nn.Module], size: int) -> None:
        """`model` is called with (tokens [B, T], labels [B, T], ...); `routers` return a `Routing`."""
        self._size, self._num_layers = size, len(routers)
        self._shards: Shards = getattr(model, "shards", Shards())
        self._chosen_S = self._chosen_keys_S = torch.empty(0, dtype=torch.int64)
        self._keys_S = torch.empty(0, dtype=torch.int64)
        self._scores: list[Tensor | None] = [None] * len(routers)
        self._new: dict[int, Tensor] = {}
        model.register_forward_pre_hook(self._before_forward)
        for layer, router in enumerate(routers):
            router.register_forward_hook(self._observer(layer))
        model.register_forward_hook(self._after_forward)

    def take(self) -> list[Tensor | None]:
        """The sample of all ranks since the last call, float32 [S, E] for each layer in the order of the keys.

        None for a layer that evaluation does not run. S is less than `size` if fewer tokens were seen. A collective;
        every rank gets the same.
        """
        keys_S, scores = self._keys_S, self._scores
        self._keys_S, self._scores = keys_S.new_empty(0), [None] * self._num_layers
        device = ranks.device()
        most = int(ranks.all_reduce_(torch.tensor(len(keys_S), device=device), "max"))  # of `size`, on any rank
        padded_S = torch.full((most,), _NO_TOKEN, device=device)
        padded_S[: len(keys_S)] = keys_S
        gathered = ranks.all_gather(padded_S)
        order = gathered.flatten().argsort(stable=True)[: self._size]
        order = order[gathered.flatten()[order] != _NO_TOKEN]
        own = order // max(most, 1) == (ranks.rank() if ranks.is_distributed() else 0)
        widths = ranks.all_reduce_(
            torch.tensor([0 if s is None else s.shape[1] for s in scores], device=device), "max"
        ).tolist()
        merged: list[Tensor | None] = []
        for found, width in zip(scores, widths, strict=True):
            whole_SE = torch.zeros(len(order), width, device=device)
            if found is not None:
                whole_SE[own] = found[order[own] % most]
            merged.append(ranks.all_reduce_(whole_SE) if width else None)
        return merged

    def _before_forward(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        if model.training:
            return
        tokens_BT, labels_BT = inputs[0], inputs[1] if len(inputs) > 1 else None
        counted_BT = torch.ones_like(tokens_BT, dtype=torch.bool) if labels_BT is None else labels_BT != IGNORED_LABEL
        keys_N = self._shards.own(token_keys(tokens_BT, counted_BT)).flatten()  # what this rank's routers will see
        self._chosen_keys_S, self._chosen_S = keys_N.topk(min(self._size, len(keys_N)), largest=False)
        self._new = {}

    def _observer(self, layer: int) -> Any:
        def observe(router: nn.Module, inputs: tuple[Any, ...], routing: Any) -> None:
            if not router.training:
                self._new[layer] = routing.scores_NE.detach()[self._chosen_S].float()

        return observe

    def _after_forward(self, model: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if model.training:
            return
        keys = torch.cat([self._keys_S.to(self._chosen_keys_S.device), self._chosen_keys_S])
        self._keys_S, kept_S = keys.topk(min(self._size, len(keys)), largest=False)
        for layer, scores_SE in self._new.items():
            old = self._scores[layer]
            self._scores[layer] = (scores_SE if old is None else torch.cat([old, scores_SE]))[kept_S]
        self._new = {}


class RecordedScores(NamedTuple):
    """What a file of recorded scores holds."""

    layers: dict[int, Tensor]
    top_k: int
    source: str


def save_scores(path: Path, scores: RecordedScores) -> None:
    """Write a file of recorded scores.

    Raises StorageError if the disk refuses.
    """
    tensors = {f"scores.{i}": scores_TE.float().cpu().contiguous() for i, scores_TE in scores.layers.items()}
    metadata = {"format": FORMAT, "top_k": str(scores.top_k), "source": scores.source}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, path, metadata=metadata)
    except (OSError, safetensors.SafetensorError) as error:
        raise StorageError(f"{path}: cannot be written ({error})") from error


def load_scores(path: Path) -> RecordedScores:
    """Read a file of recorded scores.

    Raises ConfigError if it is missing, something else, or holds what cannot be scores.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{path}: cannot be read as recorded scores ({error})") from error
    if metadata.get("format") != FORMAT or not metadata.get("top_k", "").isdigit():
        raise ConfigError(f"{path}: is no file of recorded scores; record one with launch.evaluate --record-scores")
    layers = {int(name.removeprefix("scores.")): tensor.float() for name, tensor in tensors.items()}
    for i, scores_TE in layers.items():
        if scores_TE.ndim != 2 or not scores_TE.numel() or not bool(torch.isfinite(scores_TE).all()):
            raise ConfigError(f"{path}: scores.{i} is not a table of finite numbers; record it again")
    return RecordedScores(dict(sorted(layers.items())), int(metadata["top_k"]), metadata.get("source", ""))
