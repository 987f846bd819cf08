"""Documents that share a row do not see each other: in attention, positions, targets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe.config import ModelConfig
from moe.documents import BLOCK, attend, block_mask, dense_mask, positions_in_documents
from moe.model import MoEDecoder
from tests.moe.test_model import LATENT, VOCAB, small_model, tokens_and_labels

LENGTHS = ([5, 1, 6], [12], [3, 3, 3])  # the last row ends in padding


def documents_of(lengths: tuple[list[int], ...] = LENGTHS, length: int = 12) -> torch.Tensor:
    rows = []
    for row in lengths:
        numbers = [7 + index for index, count in enumerate(row) for _ in range(count)]
        rows.append(numbers + [-1] * (length - len(numbers)))
    return torch.tensor(rows)


@pytest.mark.parametrize("changes", [{}, {"partial_rotary": 0.5, "qk_norm": True}, {"num_dense_layers": 3}, LATENT])
def test_a_document_in_a_row_is_as_if_alone(changes: dict[str, object]) -> None:
    tokens_BT, _ = tokens_and_labels()
    model = small_model(document_mask=True, **changes)
    packed_BTV = model(tokens_BT, None, documents_of())
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for count in lengths:
            alone = model(tokens_BT[row : row + 1, start : start + count])
            torch.testing.assert_close(packed_BTV[row, start : start + count], alone[0])
            start += count
    unmasked_BTV = small_model(**changes)(tokens_BT, None, documents_of())
    assert not torch.allclose(packed_BTV[0, 5:], unmasked_BTV[0, 5:]), "without the mask they do see each other"
    assert torch.equal(small_model(**changes)(tokens_BT), unmasked_BTV), "and documents change nothing"


@pytest.mark.parametrize("changes", [{}, {"num_dense_layers": 3}, LATENT])
@settings(max_examples=25)
@given(victim=st.integers(0, 3), seed=st.integers(0, 2**31))
def test_a_changed_document_leaves_its_neighbours_unchanged_bit_for_bit(
    changes: dict[str, object], victim: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (2, 4), generator=generator)
    length = int(lengths.sum(1).max()) + 2
    documents_BT = documents_of(tuple(lengths.tolist()), length)
    tokens_BT = torch.randint(0, VOCAB, (2, length), generator=generator)
    is_changed_BT = documents_BT == 7 + victim
    other_BT = torch.where(is_changed_BT, (tokens_BT + 1) % VOCAB, tokens_BT)
    model = small_model(document_mask=True, **changes)
    with torch.no_grad():
        before_BTV, after_BTV = model(tokens_BT, None, documents_BT), model(other_BT, None, documents_BT)
    assert torch.equal(before_BTV[~is_changed_BT], after_BTV[~is_changed_BT])
    assert not torch.equal(before_BTV[is_changed_BT], after_BTV[is_changed_BT])


def test_gradients_do_not_cross_either() -> None:
    tokens_BT, labels_BT = tokens_and_labels()
    documents_BT = documents_of()
    labels_BT[:, :-1][documents_BT[:, 1:] != documents_BT[:, :-1]] = -100
    labels_BT[documents_BT < 0] = -100
    for recompute in ("none", "block"):
        model = small_model(document_mask=True, activation_recompute=recompute)
        seen = []
        model.embedding.register_forward_hook(lambda _, __, out, seen=seen: (out.retain_grad(), seen.append(out))[0])
        losses_BT = model(tokens_BT, labels_BT, documents_BT)
        losses_BT[0, 5:].sum().backward()  # the second and third document of row 0
        assert (seen[0].grad[0, :5] == 0).all()
        assert (seen[0].grad[0, 6:] != 0).any(dim=1)[:-1].all()


@settings(max_examples=8)
@given(seed=st.integers(0, 2**31), grouped=st.booleans(), value_size=st.sampled_from([8, 16, 32]))
def test_block_mask_and_dense_mask_agree(seed: int, grouped: bool, value_size: int) -> None:
    """The mask used on CUDA, uncompiled, against the one used on CPUs."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 60, (2, 3), generator=generator).tolist()
    documents_BT = documents_of(tuple(lengths), 192)
    heads = (4, 2) if grouped else (2, 2)
    sizes = ((heads[0], 16), (heads[1], 16), (heads[1], value_size))
    query, key, value = (torch.randn(2, n, 192, size, generator=generator) for n, size in sizes)
    exact = attend(query, key, value, dense_mask(documents_BT))
    torch.testing.assert_close(attend(query, key, value, block_mask(documents_BT)), exact)


@settings(max_examples=40)
@given(length=st.integers(1, 700), share=st.sampled_from([0.0, 0.002, 0.01, 0.1, 1.0]), seed=st.integers(0, 2**31))
def test_blocks_are_those_of_every_score(length: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    documents_BT = (torch.rand(2, length, generator=generator) < share).cumsum(dim=1)

    def within(sample: torch.Tensor, _: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query >= key) & (documents_BT[sample, query] == documents_BT[sample, key])

    expected, found = create_block_mask(within, 2, None, length, length, device="cpu"), block_mask(documents_BT)
    assert (found.seq_lengths, found.BLOCK_SIZE) == (expected.seq_lengths, expected.BLOCK_SIZE)
    for side in ("kv", "full_kv", "q", "full_q"):
        for name in (f"{side}_num_blocks", f"{side}_indices"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_blocks_of_a_long_row_take_little_memory() -> None:
    documents_BT = torch.arange(2**17).unsqueeze(0) // 3000
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, *(t.nbytes for t in tree_leaves(out) if isinstance(t, torch.Tensor)), 0)
            return out

    with Watch():
        block_mask(documents_BT)
    assert largest <= 8 * (2**17 // BLOCK + 1) ** 2, "every score would take 16 GiB"


def test_positions_start_again_in_every_document() -> None:
    assert positions_in_documents(documents_of()).tolist() == [
        [0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5], [*range(12)], [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2],
    ]  # fmt: skip


def test_the_token_after_the_next_is_of_the_same_document() -> None:
    tokens_BT, labels_BT = tokens_and_labels()
    documents_BT = documents_of()
    # As a packed row has it: each document's last target is its own, and the next input belongs to somebody else.
    labels_BT[documents_BT < 0] = -100
    model = small_model(document_mask=True, mtp_weight=0.5)
    targets_BT = model._targets_after_next(labels_BT, documents_BT)
    assert [(row != -100).sum().item() for row in targets_BT] == [4 + 0 + 5, 11, 2 + 2 + 2]
    _, features_BX, _ = model(tokens_BT, labels_BT, documents_BT)
    other_BT = torch.where(documents_BT == 9, (tokens_BT + 1) % VOCAB, tokens_BT)
    other_labels_BT = torch.where(documents_BT == 9, (labels_BT + 1) % VOCAB, labels_BT)
    first = documents_BT == 7
    kept = torch.where(first, labels_BT, -100), torch.where(first, other_labels_BT, -100)
    losses = [
        model(tokens, labels, documents_BT)[1] for tokens, labels in zip((tokens_BT, other_BT), kept, strict=True)
    ]
    assert torch.equal(*losses)
    assert features_BX.isfinite().all()


def test_only_tokens_with_a_target_are_counted() -> None:
    tokens_BT, labels_BT = tokens_and_labels()
    documents_BT = documents_of()
    labels_BT[:, :-1][documents_BT[:, 1:] != documents_BT[:, :-1]] = -100
    labels_BT[documents_BT < 0] = -100
    model: MoEDecoder = small_model(document_mask=True)
    model(tokens_BT, labels_BT, documents_BT)
    for counts_E in model.take_counts("train"):
        assert counts_E.sum() == (labels_BT != -100).sum() * model.config.top_k


def test_document_mask_is_off_by_default() -> None:
    assert not ModelConfig().document_mask
