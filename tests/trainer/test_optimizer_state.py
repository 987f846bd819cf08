"""Fragments of parameters: whatever the cuts, the numbers come back."""

import itertools
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.errors import CheckpointError
from trainer.optimizer_state import Fragment, overlaps, read_fragments, write_fragments, write_index

SIZES = {"embedding.weight": 37, "experts.down": 64, "norm.weight": 1}
cuts = st.dictionaries(st.sampled_from(list(SIZES)), st.sets(st.integers(1, 63)), max_size=3)


def whole(name: str) -> Fragment:
    values = torch.randn(3, SIZES[name])
    return Fragment(name, SIZES[name], 0, *values)


def cut(fragment: Fragment, inner: set[int]) -> list[Fragment]:
    ends = [0, *sorted(at for at in inner if at < fragment.size), fragment.size]
    return [
        Fragment(fragment.name, fragment.size, a, *(t[a:b] for t in fragment[3:])) for a, b in itertools.pairwise(ends)
    ]


def save(folder: Path, deals: list[list[Fragment]]) -> None:
    spans = [write_fragments(folder, rank, fragments) for rank, fragments in enumerate(deals)]
    write_index(folder, spans, SIZES, clock=7.0)


@given(saved=cuts, loaded=cuts, ranks=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_any_cut_reads_what_any_other_wrote(
    saved: dict[str, set[int]],
    loaded: dict[str, set[int]],
    ranks: int,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("state")
    tensors = {name: whole(name) for name in SIZES}
    pieces = [piece for name, fragment in tensors.items() for piece in cut(fragment, saved.get(name, set()))]
    random.Random(seed).shuffle(pieces)
    save(folder, [pieces[rank::ranks] for rank in range(ranks)])
    for name, expected in tensors.items():
        for piece in cut(expected, loaded.get(name, set())):
            empty = piece._replace(**{k: torch.full_like(piece.weight, torch.nan) for k in piece._fields[3:]})
            assert read_fragments(folder, [empty]) == 7.0
            for found, wanted in zip(empty[3:], piece[3:], strict=True):
                assert torch.equal(found, wanted)


@given(ranks=st.integers(1, 5))
def test_shares_of_a_replicated_fragment_make_it_up(ranks: int) -> None:
    fragment = whole("embedding.weight")
    shares = [fragment.share(rank, ranks) for rank in range(ranks)]
    assert [share.start for share in shares[1:]] == [share.stop for share in shares[:-1]]
    assert torch.equal(torch.cat([share.exp_avg for share in shares]), fragment.exp_avg)


def test_a_gap_is_refused_with_the_parameter_and_the_elements() -> None:
    with pytest.raises(CheckpointError, match="w has no elements 4 to 9"):
        list(overlaps(0, 10, [(0, 4, "a"), (6, 10, "b")], "w"))


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [("norm.weight", 2, "1 elements for norm.weight, the model has 2"), ("other", 1, "nothing for other")],
)
def test_another_model_is_refused(name: str, size: int, message: str, tmp_path: Path) -> None:
    save(tmp_path, [[whole(each) for each in SIZES]])
    with pytest.raises(CheckpointError, match=message):
        read_fragments(tmp_path, [Fragment(name, size, 0, *torch.zeros(3, size))])
