"""From text to a prepared corpus: tokenizer, indexed shards for each domain and split, manifest.

    streams -> pieces -> parts (all workers) -> which are copies -> shards (all workers) -> manifest
    sources    lines     parts.py               duplicates.py       shards.py               manifest.py

Decisions:
- The source is cut into parts by its own bytes. A part's file depends on nothing but its text and the settings, so any
  number of workers, and any kills in between, lead to the same corpus, byte for byte.
- Everything is written to a neighbouring folder and renamed at the end; a corpus is whole or absent. What a killed or
  failed preparation had finished is verified and kept by the next one.
- A document is held out if a hash of its text says so: adding documents never moves another between the splits.
- A copy of an earlier text, in whatever domain or split, is dropped and counted; the first in source order stays.
- Preparing again with the same settings does nothing; with others it is refused rather than overwritten.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.data.config import DataConfig
from trainer.data.duplicates import first_places, judge
from trainer.data.journal import num_finished
from trainer.data.manifest import (
    MANIFEST,
    SOURCES,
    SPLITS,
    TOKENIZER,
    Manifest,
    build_manifest,
    check_still_asked_for,
    hash_file,
    preparation_settings,
    read_manifest,
    shard_prefix,
)
from trainer.data.parts import Part, PartSettings, is_heldout, part_path
from trainer.data.pool import WorkerPool
from trainer.data.shards import Segment, ShardTask, token_dtype, write_shard
from trainer.data.sources import Stream, streams_of
from trainer.data.tokenizer import end_of_document, load_tokenizer, sample_for_training, train_bpe, vocabulary_size
from trainer.data.tokenizing import JOURNAL, Status, make_parts, settings_key
from trainer.errors import CheckpointError, ConfigError, EvenkeelError, StorageError

__all__ = [
    "TOKENIZER", "Manifest", "Status", "hash_file", "is_heldout", "preparation_settings", "prepare", "read_manifest",
    "shard_prefix",
]  # fmt: skip

_MAX_DOMAINS = 1024
Progress = Callable[[Status], None]


def prepare(config: DataConfig, *, workers: int = 1, progress: Progress = lambda status: None) -> tuple[Manifest, bool]:
    """Prepare the corpus of `config`; returns its manifest, and False if it was there already.

    Raises ConfigError for a source that is missing, empty or not text, or a folder that holds another corpus;
    CheckpointError if the source changes meanwhile or a prepared file is damaged; StorageError if the disk refuses;
    PeerLostError if a worker is killed.
    """
    target = Path(config.path)
    settings = preparation_settings(config)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(target.with_name(f".{target.name}.lock"), progress):
            staging = target.with_name(f".{target.name}.tmp")
            manifest = read_manifest(target)
            if manifest is not None:
                check_still_asked_for(target, manifest, settings)
                _check_tokenizer(config, target)
                shutil.rmtree(staging, ignore_errors=True)  # killed between its last two steps
                return manifest, False
            if target.exists():  # without a manifest: something that is not ours to delete
                raise ConfigError(
                    f"data.path: {target} exists and is not a prepared corpus; remove it or choose another"
                )
            with _kept_if_worth_it(staging):
                manifest = _build(config, settings, staging, workers, progress)
                os.replace(staging / "corpus", target)
                _fsync(target.parent)
            shutil.rmtree(staging)
            return manifest, True
    except OSError as error:
        raise _storage_error(error, target) from error


def _build(config: DataConfig, settings: dict[str, Any], staging: Path, workers: int, progress: Progress) -> Manifest:
    corpus, parts_folder, scratch = staging / "corpus", staging / "parts", staging / "scratch"
    for folder in (corpus, scratch):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    parts_folder.mkdir(exist_ok=True)
    streams = streams_of(config)
    tokenizer = _tokenizer(config, settings, streams, staging, progress)
    vocab_size = vocabulary_size(tokenizer)
    part_settings = PartSettings(
        folder=str(parts_folder),
        tokenizer=str(staging / TOKENIZER),
        tokenizer_sha256=hash_file(staging / TOKENIZER),
        end_of_document=end_of_document(tokenizer),
        token_dtype=token_dtype(vocab_size),
        heldout_fraction=config.heldout_fraction,
        skip_bad=config.on_bad_document == "skip",
    )
    with WorkerPool(workers) as pool:
        parts = make_parts(config, settings, streams, part_settings, pool, progress)
        progress(Status("looking for copies"))
        verdicts = judge(parts, parts_folder, scratch, near_duplicates=config.filters.near_duplicates)
        progress(Status("writing shards"))
        tasks = _shard_tasks(parts, part_settings, verdicts, corpus)
        shards = list(pool.ordered(write_shard, tasks))
    shutil.copy(staging / TOKENIZER, corpus / TOKENIZER)
    manifest = build_manifest(config, parts, shards, corpus / TOKENIZER, vocab_size, end=part_settings.end_of_document)
    sizes = {name: size for stream in streams for name, size in stream.files.items()}
    (corpus / SOURCES).write_text(json.dumps(sizes, indent=1))
    (corpus / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (corpus / TOKENIZER, corpus / SOURCES, corpus / MANIFEST, corpus):
        _fsync(path)
    return manifest


def _tokenizer(
    config: DataConfig, settings: dict[str, Any], streams: list[Stream], staging: Path, progress: Progress
) -> Any:
    """The tokenizer of the corpus, saved in `staging`; a trained one is taken from there if nothing changed."""
    path, note = staging / TOKENIZER, staging / "tokenizer.key"
    identities = [stream.identity for stream in streams]
    key = settings_key(settings, *identities) if all(identities) else ""
    if config.tokenizer != "bpe":
        tokenizer = load_tokenizer(config.tokenizer)
    elif key and note.exists() and note.read_text() == f"{key} {hash_file(path)}":
        return load_tokenizer(str(path))
    else:
        progress(Status("training the tokenizer"))
        tokenizer = train_bpe(sample_for_training(config, streams), config.vocab_size)
    end_of_document(tokenizer)  # before hours of work
    tokenizer.save(str(path))
    note.write_text(f"{key} {hash_file(path)}")
    return tokenizer


def _shard_tasks(parts: list[Part], settings: PartSettings, verdicts: Path, corpus: Path) -> list[ShardTask]:
    domains = sorted({run.domain for part in parts for run in part.runs})
    if len(domains) > _MAX_DOMAINS:
        raise ConfigError(
            f"data.domain_field: names {len(domains)} domains ({', '.join(domains[:3])}, ...), more than "
            f"{_MAX_DOMAINS}; choose another column"
        )
    segments: dict[tuple[str, str], list[Segment]] = {(d, split): [] for d in domains for split in SPLITS}
    for part, first_place in zip(parts, first_places(parts), strict=False):
        documents = tokens = 0
        path = str(part_path(settings.folder, part.stream, part.number))
        for run in part.runs:
            ends = documents + run.documents, tokens + run.tokens
            segments[run.domain, run.split].append(Segment(path, first_place, (documents, ends[0]), (tokens, ends[1])))
            documents, tokens = ends
    return [
        ShardTask(
            domain, split, str(shard_prefix(corpus, domain, split)), settings.token_dtype, str(verdicts), tuple(found)
        )
        for (domain, split), found in segments.items()
    ]


def _check_tokenizer(config: DataConfig, target: Path) -> None:
    """A tokenizer that lies in a file must still be the one of the shards."""
    if config.tokenizer != "bpe" and Path(config.tokenizer).exists():
        given = load_tokenizer(config.tokenizer)
        prepared = load_tokenizer(str(target / TOKENIZER))
        if given.to_str() != prepared.to_str():
            raise CheckpointError(
                f"data.tokenizer: {config.tokenizer} (vocabulary {vocabulary_size(given)}) is not the tokenizer that "
                f"{target} was prepared with (vocabulary {vocabulary_size(prepared)}); prepare in another data.path"
            )


@contextmanager
def _only_one(lock: Path, progress: Progress) -> Iterator[None]:
    """Let one process prepare a folder at a time; others wait and then find the work done."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(Status(f"waiting for the preparation that holds {lock}"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _kept_if_worth_it(staging: Path) -> Iterator[None]:
    """After an error, leave finished parts for the next start and say so; leave nothing else."""
    try:
        staging.mkdir(exist_ok=True)
        yield
    except Exception as error:
        kept = num_finished(staging / "parts" / JOURNAL)
        if not kept:
            shutil.rmtree(staging, ignore_errors=True)
        elif isinstance(error, EvenkeelError | OSError):
            known = _storage_error(error, staging) if isinstance(error, OSError) else error
            raise type(known)(f"{known} ({kept} finished parts are kept in {staging} for the next start)") from error
        raise


def _fsync(path: Path) -> None:
    """Have a file or folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _storage_error(error: OSError, target: Path) -> StorageError:
    where, what = error.filename or target, error.strerror or error
    return StorageError(f"{where}: {what}; free space or choose another data.path")
