"""Rows made of documents: nothing twice, nothing lost, nothing across a border."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.config import DataConfig
from trainer.data.corpus import TokenCorpus
from trainer.data.packing import SplitPacking, best_fit_decreasing, pack_best_fit

LENGTH = 32


def naive_best_fit(sizes: list[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        spaces = [capacity - sum(sizes[i] for i in members) for members in bins]
        fitting = [index for index, space in enumerate(spaces) if space >= sizes[item]]
        if fitting:
            bins[min(fitting, key=lambda index: spaces[index])].append(item)
        else:
            bins.append([item])
    return bins


@given(capacity=st.integers(1, 40), data=st.data())
def test_best_fit_is_the_textbook_one(capacity: int, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, capacity), max_size=80))
    bins_P = best_fit_decreasing(np.array(sizes, dtype=np.int64), capacity)
    filled = np.bincount(bins_P, weights=sizes, minlength=0).astype(int).tolist()
    # Bins of one remaining space are alike, so which of them takes an item is free; how full all get is not.
    expected = [sum(sizes[i] for i in members) for members in naive_best_fit(sizes, capacity)]
    assert sorted(filled) == sorted(expected)


@given(lengths=st.lists(st.integers(1, 100), max_size=60), capacity=st.integers(1, 50))
def test_every_target_is_in_one_place(lengths: list[int], capacity: int) -> None:
    starts = np.cumsum([0, *lengths])[:-1].astype(np.int64)
    packing = pack_best_fit(starts, sum(lengths), capacity)
    rows = [packing.spans(row) for row in range(packing.num_rows)]
    targets = Counter(token + 1 for row in rows for span in row for token in range(*span))
    first_tokens = set(starts.tolist())
    assert targets == Counter(set(range(sum(lengths))) - first_tokens), "all but the first token of each document"
    for row in rows:
        assert 0 < sum(stop - start for start, stop in row) <= capacity
        assert all(stop - start < capacity for start, stop in row) or len(row) == 1
    again = pack_best_fit(starts, sum(lengths), capacity)
    assert [again.spans(row) for row in range(again.num_rows)] == rows


@given(tokens=st.integers(0, 200), length=st.integers(1, 40))
def test_split_rows_are_the_stream(tokens: int, length: int) -> None:
    partial = SplitPacking(tokens, length, partial=True)
    spans = [span for row in range(partial.num_rows) for span in partial.spans(row)]
    assert [token for span in spans for token in range(*span)] == list(range(tokens - 1))
    full = SplitPacking(tokens, length, partial=False)
    assert [full.spans(row) for row in range(full.num_rows)] == [
        [span] for span in spans if span.stop - span.start == length
    ]


def opened(config: DataConfig, *, mask: bool, packing: str = "split") -> TokenCorpus:
    config = dataclasses.replace(config, packing=packing)
    return TokenCorpus.open(config, sequence_length=LENGTH, seed=5, mask_documents=mask)


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_rows_are_made_of_the_documents_they_name(data_config: DataConfig, packing: str) -> None:
    corpus = opened(data_config, mask=True, packing=packing)
    rows = corpus.train_batch(np.arange(1000))
    borders = 0
    for tokens_T, labels_T, documents_T, domain in zip(
        rows.tokens_ST.numpy(), rows.labels_ST.numpy(), rows.documents_ST.numpy(), rows.domains_S.tolist(), strict=True
    ):
        shard = corpus._train[domain]
        stream, starts = shard.tokens, np.append(shard.document_starts(), len(shard))
        assert (labels_T[documents_T < 0] == -100).all()
        for document in np.unique(documents_T[documents_T >= 0]):
            (places,) = np.nonzero(documents_T == document)
            assert (np.diff(places) == 1).all(), "a document stands in one piece"
            text = stream[starts[document] : starts[document + 1]].tolist()
            piece = tokens_T[places].tolist()
            labels = [label for label in labels_T[places].tolist() if label != -100]
            wanted = piece[:1] + labels if len(labels) == len(piece) else piece
            assert piece[1:] == labels[: len(piece) - 1]
            assert any(text[at : at + len(wanted)] == wanted for at in range(len(text))), "consecutive, in its document"
            borders += len(piece) > len(labels)
    if packing == "split":
        assert borders > 2
        assert (rows.documents_ST >= 0).all()
    else:
        assert borders == 0, "the last token of a document is a target only"
        assert (rows.documents_ST < 0).any()


def test_without_masks_labels_are_the_stream_and_documents_are_known(data_config: DataConfig) -> None:
    plain, masked = opened(data_config, mask=False), opened(data_config, mask=True)
    samples = np.arange(100)
    free, kept = plain.train_batch(samples), masked.train_batch(samples)
    assert (free.labels_ST >= 0).all()
    assert free.documents_ST.equal(kept.documents_ST)
    assert free.tokens_ST.equal(kept.tokens_ST)
    crosses = free.documents_ST[:, 1:] != free.documents_ST[:, :-1]
    assert (kept.labels_ST[:, :-1][crosses] == -100).all()
    differs = free.labels_ST != kept.labels_ST
    assert (kept.labels_ST[differs] == -100).all()
    assert (free.tokens_ST[differs] == int(plain._train[0].tokens[-1])).all(), (
        "only after the end of a document is nothing asked for"
    )


@pytest.mark.parametrize("packing", ["split", "best_fit"])
@pytest.mark.parametrize("mask", [True, False])
def test_heldout_counts_every_token_once(data_config: DataConfig, packing: str, mask: bool) -> None:
    if packing == "best_fit" and not mask:
        pytest.skip("refused by the configuration")
    corpus = opened(data_config, mask=mask, packing=packing)
    for domain in range(len(corpus.domain_names)):
        rows = corpus.heldout_batch(domain, 0, corpus.heldout_rows(domain))
        shard = corpus._heldout[domain]
        first_tokens = shard.document_starts() if mask else np.array([0])
        expected = np.delete(shard.tokens, first_tokens).tolist()
        targets = rows.labels_ST[rows.labels_ST != -100].tolist()
        assert (sorted(targets) == sorted(expected)) if packing == "best_fit" else (targets == expected)
