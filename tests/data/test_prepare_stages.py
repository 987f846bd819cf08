"""The stages of a preparation, each against a plain reference."""

import hashlib
import json
import operator
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from tokenizers import Tokenizer

from trainer.data.documents import Piece
from trainer.data.duplicates import DUPLICATE, KEPT, judge
from trainer.data.journal import Journal
from trainer.data.mixture import FilterConfig
from trainer.data.near_duplicates import NUM_VALUES, band_width, followers, signature, similarity
from trainer.data.parts import Part, PartSettings, PartTask, load_part, make_part, text_digest
from trainer.data.pool import Done, WorkerPool
from trainer.data.shards import token_dtype, write_index
from trainer.data.tokenizer import train_bpe


def pieces_of(texts: list[str]) -> tuple[Piece, ...]:
    payload = "\n".join(json.dumps({"text": text}) for text in texts).encode()
    return (Piece("file", 1, len(texts), "json_lines", payload, "text", "", "d"),)


@pytest.fixture
def settings(tmp_path: Path) -> PartSettings:
    tokenizer = train_bpe(["one two three four five six seven eight"], 300)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return PartSettings(str(tmp_path), str(tmp_path / "tokenizer.json"), "", 0, "uint16", 0.3, skip_bad=False)


@pytest.mark.parametrize("vocab_size", [300, 65499, 65500, 100_000])
@pytest.mark.parametrize("num_documents", [0, 1, 1000])
def test_an_index_has_the_bytes_that_megatron_core_writes(vocab_size: int, num_documents: int, tmp_path: Path) -> None:
    lengths = np.random.default_rng(1).integers(1, 9, num_documents).astype(np.int32)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size))
    for length in lengths:
        builder.add_document(torch.zeros(int(length), dtype=torch.int64), [int(length)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    facts = write_index(tmp_path / "ours.idx", lengths, token_dtype(vocab_size))
    theirs = (tmp_path / "theirs.idx").read_bytes()
    assert (tmp_path / "ours.idx").read_bytes() == theirs
    assert facts == {"size": len(theirs), "sha256": hashlib.sha256(theirs).hexdigest()}
    assert (tmp_path / "theirs.bin").stat().st_size == lengths.sum() * np.dtype(token_dtype(vocab_size)).itemsize


def test_long_indexes_are_written_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.arange(1, 100, dtype=np.int32)
    whole = write_index(tmp_path / "whole.idx", lengths, "int32")
    monkeypatch.setattr("trainer.data.shards._CHUNK", 7)
    assert write_index(tmp_path / "chunks.idx", lengths, "int32") == whole


@given(st.lists(st.lists(st.integers(0, 12), max_size=12), min_size=1, max_size=6), st.integers(24, 400))
def test_the_first_of_equal_texts_stays(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[list[int]], bucket_bytes: int
) -> None:
    """Over parts and buckets of any size, as by one pass with a set."""
    folder = tmp_path_factory.mktemp("parts")
    tokenizer = train_bpe(["0 1 2 3"], 260)
    tokenizer.save(str(folder / "t.json"))
    settings = PartSettings(str(folder), str(folder / "t.json"), str(folder), 0, "uint16", 0.3, skip_bad=False)
    parts = []
    for index, part_numbers in enumerate(numbers):
        part = make_part(PartTask(0, index, pieces_of([str(n) for n in part_numbers]), FilterConfig()), settings)
        assert isinstance(part, Part)
        parts.append(part)
    scratch = folder / "scratch"
    scratch.mkdir()
    path = judge(parts, folder, scratch, near_duplicates=0.0, bucket_bytes=bucket_bytes)
    assert [each.name for each in scratch.iterdir()] == ["verdicts"]
    verdicts = np.fromfile(path, np.uint8)
    kept: list[tuple[int, int]] = []
    place = 0
    for index, part in enumerate(parts):
        (positions,) = load_part(folder, part, "position")
        kept += [(index, int(p)) for p in positions if verdicts[place + int(p)] == KEPT]
        place += part.rows
    seen: set[int] = set()
    expected = []
    for index, part_numbers in enumerate(numbers):
        for position, number in enumerate(part_numbers):
            if number not in seen:
                seen.add(number)
                expected.append((index, position))
    assert sorted(kept) == expected
    within = sum(part.dropped.get("d", {}).get("duplicate", 0) for part in parts)
    assert within + int((verdicts == DUPLICATE).sum()) == sum(map(len, numbers)) - len(expected)


def shingled(ids: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(ids[i : i + 5].tolist()) for i in range(max(len(ids) - 4, 1))}


def test_signatures_estimate_the_similarity_of_shingles() -> None:
    rng = np.random.default_rng(0)
    errors = []
    for share in np.linspace(0, 1, 21):
        first = rng.integers(0, 60_000, 400).astype(np.uint16)
        second = np.where(np.arange(400) < 400 * share, first, rng.integers(0, 60_000, 400)).astype(np.uint16)
        exact = len(shingled(first) & shingled(second)) / len(shingled(first) | shingled(second))
        errors.append(similarity(signature(first), signature(second)) - exact)
    assert np.sqrt(np.mean(np.square(errors))) < 0.5 / np.sqrt(NUM_VALUES) * 1.3
    assert (signature(np.array([1, 2], np.uint16)) != signature(np.array([1, 3], np.uint16))).any()
    assert (signature(np.empty(0, np.uint16)) == signature(np.empty(0, np.uint16))).all()


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95, 1.0])
def test_bands_find_pairs_at_the_threshold(threshold: float) -> None:
    width = band_width(threshold)
    assert 1 - (1 - threshold**width) ** (NUM_VALUES // width) >= 0.95
    if width < NUM_VALUES:
        assert 1 - (1 - threshold ** (width + 1)) ** (NUM_VALUES // (width + 1)) < 0.95


def test_documents_that_follow_a_similar_one_are_found() -> None:
    rng = np.random.default_rng(3)
    originals = [rng.integers(0, 60_000, 300).astype(np.uint16) for _ in range(40)]
    documents = list(originals)
    for number in range(0, 40, 2):
        changed = originals[number].copy()
        changed[number * 3 : number * 3 + 5] = 7  # a similarity of about 0.94
        documents.append(changed)
    documents.append(np.concatenate([originals[0][:150], originals[1][150:]]))  # half of two
    signatures = np.array([signature(each) for each in documents])
    follows = followers(signatures, 0.8)
    assert follows.tolist() == [False] * 40 + [True] * 20 + [False]
    assert not followers(signatures[:0], 0.8).size


def test_filters_count_what_they_drop(settings: PartSettings) -> None:
    texts = ["", "five", "five", "x" * 101, "~", "~" * 30, "fine text", "fine text too"]
    filters = FilterConfig(min_characters=1, max_characters=100, min_tokens=2, max_tokens=20)
    part = make_part(PartTask(0, 0, pieces_of(texts), filters), settings)
    assert isinstance(part, Part)
    tokenizer = Tokenizer.from_file(settings.tokenizer)
    assert len(tokenizer.encode("five").ids) == 2
    assert part.dropped == {
        "d": {"min_characters": 1, "duplicate": 1, "max_characters": 1, "min_tokens": 1, "max_tokens": 1}
    }
    assert sum(run.documents for run in part.runs) == 3
    assert part.rows == len(texts)


def test_a_part_is_a_function_of_its_text(settings: PartSettings, tmp_path: Path) -> None:
    task = PartTask(2, 3, pieces_of([f"text {n % 7}" for n in range(20)]), FilterConfig(near_duplicates=0.8))
    first = make_part(task, settings)
    content = (tmp_path / "part-000002-000003.safetensors").read_bytes()
    assert make_part(task, settings) == first
    assert (tmp_path / "part-000002-000003.safetensors").read_bytes() == content
    assert isinstance(first, Part)
    assert Part.from_json(first.to_json()) == first
    other = task._replace(pieces=pieces_of([f"text {n % 8}" for n in range(20)]))
    assert other.digest != task.digest
    assert task._replace(filters=FilterConfig()).digest != task.digest


def test_digests_are_of_the_text_and_short() -> None:
    assert text_digest("a") == hashlib.sha256(b"a").digest()[:16]


def test_a_torn_journal_counts_up_to_the_tear(settings: PartSettings, tmp_path: Path) -> None:
    part = make_part(PartTask(0, 0, pieces_of(["one"]), FilterConfig()), settings)
    assert isinstance(part, Part)
    path = tmp_path / "journal"
    with Journal(path, "key") as journal:
        for number in range(3):
            journal.add_part(part._replace(number=number))
        journal.add_stream(0, "unchanged", 3)
    with Journal(path, "key") as journal:
        assert [each.number for each in journal.finished(0, "unchanged") or []] == [0, 1, 2]
        assert journal.finished(0, "changed") is None
        assert journal.finished(0, "") is None
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with Journal(path, "key") as journal:
            assert len(journal.parts) == max(whole[:cut].count(b"\n") - 1, 0)
            assert journal.finished(0, "unchanged") is None
    path.write_bytes(whole.replace(b'"rows"', b'"rwos"', 1))
    with Journal(path, "key") as journal:
        assert not journal.parts
    path.write_bytes(whole)
    with Journal(path, "another key") as journal:
        assert not journal.parts


@pytest.mark.parametrize("workers", [1, 2])
def test_results_and_errors_come_in_the_order_of_the_tasks(workers: int) -> None:
    divided = partial(operator.floordiv, 720)  # of a light module: workers import where a function is from

    def tasks(numbers: Iterable[int]) -> list[int | Done[int]]:
        return [Done(-n) if n % 5 == 4 else n for n in numbers]

    with WorkerPool(workers) as pool:
        expected = [-n if n % 5 == 4 else 720 // n for n in range(1, 13)]
        assert list(pool.ordered(divided, tasks(range(1, 13)))) == expected
        found: list[int] = []
        with pytest.raises(ZeroDivisionError):
            found.extend(pool.ordered(divided, tasks([*range(1, 13), 0, *range(1, 20)])))
        assert found == expected

        def failing() -> Iterator[int | Done[int]]:
            yield from tasks(range(1, 4))
            raise RuntimeError("the source failed")

        found = []
        with pytest.raises(RuntimeError, match="the source failed"):
            found.extend(pool.ordered(divided, failing()))
        assert found == expected[:3]
