"""From files to micro-batches: what is written is what is read, in the order that was promised."""

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from trainer.data.config import DataConfig
from trainer.data.corpus import TokenCorpus
from trainer.data.loader import TrainLoader
from trainer.data.local_python import local_python_documents
from trainer.data.prepare import is_heldout, prepare, read_manifest
from trainer.data.sources import read_documents
from trainer.errors import CheckpointError, ConfigError

LENGTH = 32


def open_corpus(config: DataConfig, **arguments: object) -> TokenCorpus:
    return TokenCorpus.open(config, **({"sequence_length": LENGTH, "seed": 5, "mask_documents": False} | arguments))  # type: ignore[arg-type]


def test_prepared_tokens_decode_to_the_documents(data_config: DataConfig) -> None:
    tokenizer = Tokenizer.from_file(f"{data_config.path}/tokenizer.json")
    corpus = open_corpus(data_config)
    documents = list(read_documents(data_config))
    for index, domain in enumerate(corpus.domain_names):
        for split, stream in (("train", corpus._train[index].tokens), ("heldout", corpus._heldout[index].tokens)):
            expected = [
                d.text
                for d in dict.fromkeys(documents)
                if d.domain == domain and is_heldout(d.text, data_config.heldout_fraction) == (split == "heldout")
            ]
            text = tokenizer.decode(stream.tolist(), skip_special_tokens=False)
            assert text == "".join(f"{document}<|endoftext|>" for document in expected)


def test_rows_are_consecutive_windows_with_shifted_labels(data_config: DataConfig) -> None:
    corpus = open_corpus(data_config)
    rows = corpus.train_batch(np.arange(50))
    assert torch.equal(rows.tokens_ST[:, 1:], rows.labels_ST[:, :-1])
    assert rows.tokens_ST.shape == (50, LENGTH)
    for tokens, label, domain in zip(
        rows.tokens_ST.tolist(), rows.labels_ST[:, -1].tolist(), rows.domains_S, strict=True
    ):
        stream = corpus._train[int(domain)].tokens.tolist()
        starts = [s for s in range(0, len(stream) - LENGTH, LENGTH) if stream[s : s + LENGTH] == tokens]
        assert any(stream[s + LENGTH] == label for s in starts)


def test_every_heldout_token_counts_once(data_config: DataConfig) -> None:
    corpus = open_corpus(data_config)
    for domain in range(len(corpus.domain_names)):
        rows = corpus.heldout_batch(domain, 0, corpus.heldout_rows(domain))
        targets = rows.labels_ST[rows.labels_ST != -100]
        assert targets.tolist() == corpus._heldout[domain].tokens[1:].tolist()
        assert corpus.heldout_rows(domain) > 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_batch_does_not_depend_on_how_it_is_dealt(data_config: DataConfig, num_workers: int) -> None:
    corpus = open_corpus(data_config)

    def step(world: int, micro: int, start: int) -> dict[int, tuple[list[int], int]]:
        found = {}
        for rank in range(world):
            loader = TrainLoader(
                corpus,
                global_batch_size=8,
                micro_batch_size=micro,
                rank=rank,
                world_size=world,
                num_workers=num_workers,
            )
            batches = loader.batches(start)
            next(batches)
            for batch in next(batches):
                for i, sample in enumerate(batch.sample_ids_b.tolist()):
                    found[sample] = (batch.tokens_bT[i].tolist(), int(batch.domains_b[i]))
        return found

    expected = step(1, 8, 3)
    assert sorted(expected) == list(range(32, 40)), "the fifth step, counted from 0, is samples 32 to 39"
    assert step(2, 2, 3) == expected
    if not num_workers:
        assert step(4, 1, 3) == step(1, 2, 3) == expected


def test_workers_see_the_same_data(data_config: DataConfig) -> None:
    corpus = open_corpus(data_config)

    def first_steps(num_workers: int) -> list[list[int]]:
        batches = TrainLoader(
            corpus, global_batch_size=4, micro_batch_size=2, rank=0, world_size=1, num_workers=num_workers
        ).batches(0)
        return [batch.tokens_bT.flatten().tolist() for _ in range(3) for batch in next(batches)]

    assert first_steps(0) == first_steps(2)


def test_weights_blend_domains(data_config: DataConfig) -> None:
    weights = {"code": 3.0, "table": 1.0}
    corpus = open_corpus(dataclasses.replace(data_config, weights=weights))
    domains = corpus.train_batch(np.arange(4096)).domains_S.tolist()
    counts = Counter(corpus.domain_names[domain] for domain in domains)
    assert counts == {"code": 3072, "table": 1024}


def test_heldout_split_is_by_text_not_by_position(tmp_path: Path, data_config: DataConfig) -> None:
    source = Path(data_config.source)
    lines = source.read_text().splitlines(keepends=True)
    extra = json.dumps({"text": "a new document " * 20, "domain": "code"}) + "\n"
    (tmp_path / "more.jsonl").write_text(extra + "".join(reversed(lines)) + lines[0])
    changed = dataclasses.replace(data_config, source=str(tmp_path / "more.jsonl"), path=str(tmp_path / "more"))
    manifest, is_new = prepare(changed)
    assert is_new
    original = read_manifest(Path(data_config.path))
    assert original is not None
    for domain in ("prose", "table"):
        for split in ("train", "heldout"):
            assert manifest["domains"][domain][split]["documents"] == original["domains"][domain][split]["documents"]
    assert manifest["duplicates_dropped"] == original["duplicates_dropped"] + 1


def test_preparing_twice_does_nothing_and_other_settings_are_refused(data_config: DataConfig) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(data_config.path).iterdir()}
    _, is_new = prepare(data_config)
    assert not is_new
    assert before == {path: path.stat().st_mtime_ns for path in Path(data_config.path).iterdir()}
    with pytest.raises(ConfigError, match=r"heldout_fraction: 0.1 -> 0.5"):
        prepare(dataclasses.replace(data_config, heldout_fraction=0.5))


def test_a_folder_that_is_something_else_is_not_overwritten(tmp_path: Path, data_config: DataConfig) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="is not a prepared corpus"):
        prepare(dataclasses.replace(data_config, path=str(tmp_path / "mine")))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.fault(23, "shard truncated, missing, flipped, when it is verified")
@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped"])
def test_damaged_shards_are_named(tmp_path: Path, data_config: DataConfig, damage: str) -> None:
    shutil.copytree(data_config.path, tmp_path / "copy")
    shard = tmp_path / "copy" / "prose-train.bin"
    content = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    else:
        content = content[:-1] if damage == "truncated" else bytes([content[0] ^ 1]) + content[1:]
        shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"prose-train\.bin"):
        open_corpus(dataclasses.replace(data_config, path=str(tmp_path / "copy")), verify=True)


def test_text_parquet_and_compressed_sources(tmp_path: Path) -> None:
    import gzip

    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "essays.txt").write_text("one long essay\nwith two lines")
    with gzip.open(folder / "zipped.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "from a zip"}) + "\n")
    datasets.Dataset.from_dict({"text": ["row one", "row two"], "domain": ["x", "y"]}).to_parquet(
        folder / "table.parquet"
    )
    found = list(read_documents(DataConfig(source=str(folder))))
    assert found == [
        ("one long essay\nwith two lines", "essays"), ("row one", "x"), ("row two", "y"), ("from a zip", "zipped"),
    ]  # fmt: skip


def test_a_given_tokenizer_is_used(tmp_path: Path, data_config: DataConfig) -> None:
    given = f"{data_config.path}/tokenizer.json"
    config = dataclasses.replace(data_config, tokenizer=given, path=str(tmp_path / "again"))
    manifest, _ = prepare(config)
    original = read_manifest(Path(data_config.path))
    assert original is not None
    assert manifest["domains"] == original["domains"]
    with pytest.raises(ConfigError, match="does not exist"):
        prepare(dataclasses.replace(config, tokenizer="./nowhere.json", path=str(tmp_path / "no")))


def test_local_python_has_domains_that_differ() -> None:
    texts: dict[str, list[str]] = {}
    for text, domain in local_python_documents(cap_scale=0.03):
        texts.setdefault(domain, []).append(text)
    assert len(texts) >= 5
    letters = {domain: Counter("".join(found)[:20_000]) for domain, found in texts.items()}
    profiles = {d: np.array([c[chr(i)] for i in range(32, 127)]) / c.total() for d, c in letters.items()}
    names = sorted(profiles)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert np.abs(profiles[first] - profiles[second]).sum() > 0.1, (first, second)
    assert list(local_python_documents(cap_scale=0.003)) == list(local_python_documents(cap_scale=0.003))
