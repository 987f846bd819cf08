"""From documents to a prepared corpus: tokenizer, indexed shards for each domain and split, manifest.

Decisions:
- Everything is written to a neighbouring temporary folder and renamed at the end; a corpus is whole or absent.
- A document is held out if a hash of its text says so: adding documents never moves another between the splits.
- A text seen before is dropped and counted, so that no held-out text can be a copy of a training text.
- Preparing again with the same settings does nothing; with others it is refused rather than overwritten.
"""

import fcntl
import hashlib
import heapq
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from trainer.data.config import DataConfig
from trainer.data.indexed import ShardWriter
from trainer.data.sources import Document, read_documents
from trainer.data.tokenizer import end_of_document, load_tokenizer, train_bpe
from trainer.errors import ConfigError, StorageError

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
SPLITS = ("train", "heldout")
_BATCH = 256  # documents handed to the tokenizer's threads at once
_TRAINING_FIELDS = (
    "path",
    "weights",
    "phases",
    "max_epochs",
    "packing",
    "num_workers",
    "prefetch_steps",
    "sampling_delay",
)  # fields of DataConfig that preparing does not depend on

Manifest = dict[str, Any]


def prepare(config: DataConfig, *, progress: Callable[[str], None] = lambda line: None) -> tuple[Manifest, bool]:
    """Prepare the corpus of `config`; returns its manifest, and False if it was there already.

    Raises ConfigError for a source that is missing, empty or not text, or a folder that holds another corpus;
    StorageError if the disk refuses.
    """
    target = Path(config.path)
    settings = preparation_settings(config)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(target.with_name(f".{target.name}.lock")):
            manifest = read_manifest(target)
            if manifest is not None:
                _refuse_other_settings(target, manifest, settings)
                return manifest, False
            staging = target.with_name(f".{target.name}.tmp")
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            try:
                manifest = _build(config, settings, staging, progress)
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise
            if target.exists():  # without a manifest: the remains of something that is not ours to delete
                shutil.rmtree(staging)
                raise ConfigError(
                    f"data.path: {target} exists and is not a prepared corpus; remove it or choose another"
                )
            os.replace(staging, target)
            return manifest, True
    except OSError as error:
        raise StorageError(
            f"{error.filename or target}: {error.strerror}; free space or choose another data.path"
        ) from error


def preparation_settings(config: DataConfig) -> dict[str, Any]:
    """The settings the prepared files depend on."""
    return {key: value for key, value in asdict(config).items() if key not in _TRAINING_FIELDS}


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a prepared corpus, or None if there is none.

    Raises ConfigError if it is unreadable or of another format.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] == FORMAT:
            return dict(manifest)
        problem = f"has format {manifest['format']}, this code reads format {FORMAT}"
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError):
        problem = "is unreadable"
    raise ConfigError(f"{folder / MANIFEST} {problem}; prepare the corpus again in another data.path")


def is_heldout(text: str, fraction: float) -> bool:
    """Whether a document is held out: a function of its text alone."""
    return int.from_bytes(_digest(text)[:8], "big") < fraction * 2**64


def shard_prefix(folder: Path, domain: str, split: str) -> Path:
    """Where the shard of a domain and split lies, without its ending."""
    return folder / f"{domain}-{split}"


def hash_file(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build(config: DataConfig, settings: dict[str, Any], staging: Path, progress: Callable[[str], None]) -> Manifest:
    if config.tokenizer == "bpe":
        progress("reading documents and training the tokenizer")
        tokenizer = train_bpe(_sample(read_documents(config), int(config.tokenizer_sample_mb * 1e6)), config.vocab_size)
    else:
        tokenizer = load_tokenizer(config.tokenizer)
    end = end_of_document(tokenizer)
    tokenizer.save(str(staging / TOKENIZER))
    vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)

    progress("tokenizing")
    domains, duplicates = _write_shards(config, tokenizer, end, vocab_size, staging)
    if not any(counts["train"]["documents"] for counts in domains.values()):
        raise ConfigError(
            f"data.source: {config.source} has no document to train on; add text, or lower heldout_fraction"
        )
    files = {path.name: {"size": path.stat().st_size, "sha256": hash_file(path)} for path in sorted(staging.iterdir())}
    manifest = {
        "format": FORMAT,
        "settings": settings,
        "tokenizer": {"file": TOKENIZER, "vocab_size": vocab_size, "end_of_document": end},
        "domains": domains,
        "duplicates_dropped": duplicates,
        "files": files,
        "fingerprint": hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest(),
        "versions": {name: version(name) for name in ("tokenizers", "datasets", "megatron-core")},
    }
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=1))
    return manifest


def _write_shards(
    config: DataConfig, tokenizer: Tokenizer, end: int, vocab_size: int, staging: Path
) -> tuple[dict[str, Any], int]:
    """Tokenize everything into one shard a domain and split; counts by domain, and how many duplicates were dropped."""
    writers: dict[tuple[str, str], ShardWriter] = {}
    characters: dict[str, int] = {}
    seen: set[bytes] = set()
    num_read = 0
    for batch in _batches(read_documents(config)):
        num_read += len(batch)
        fresh = [document for document in batch if _is_new(document.text, seen)]
        for document, encoding in zip(fresh, tokenizer.encode_batch_fast([d.text for d in fresh]), strict=True):
            domain = _checked_domain(document.domain)
            split = "heldout" if is_heldout(document.text, config.heldout_fraction) else "train"
            if (domain, "train") not in writers:
                for each in SPLITS:
                    writers[domain, each] = ShardWriter(shard_prefix(staging, domain, each), vocab_size)
            writers[domain, split].add([*encoding.ids, end])
            characters[domain] = characters.get(domain, 0) + len(document.text.encode())
    if not num_read:
        raise ConfigError(f"data.source: {config.source} has no document; give a source with text")
    for writer in writers.values():
        writer.close()
    domains = {
        domain: {
            **{s: {"documents": writers[domain, s].documents, "tokens": writers[domain, s].tokens} for s in SPLITS},
            "bytes": characters[domain],
        }
        for domain in sorted(characters)
    }
    return domains, num_read - len(seen)


def _sample(documents: Iterable[Document], budget_bytes: int) -> Iterator[str]:
    """Documents for the tokenizer: those with the smallest hashes, up to the budget. Independent of their order."""
    heap: list[tuple[int, str]] = []  # largest hash on top
    kept = 0
    for document in documents:
        heapq.heappush(heap, (-int.from_bytes(_digest(document.text)[:8], "big"), document.text))
        kept += len(document.text.encode())
        while kept > budget_bytes and len(heap) > 1:
            kept -= len(heapq.heappop(heap)[1].encode())
    yield from (text for _, text in sorted(heap, reverse=True))


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    iterator = iter(documents)
    while batch := list(itertools.islice(iterator, _BATCH)):
        yield batch


def _is_new(text: str, seen: set[bytes]) -> bool:
    digest = _digest(text)
    if digest in seen:
        return False
    seen.add(digest)
    return True


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _checked_domain(domain: str) -> str:
    if not domain or not domain.isprintable() or any(mark in domain for mark in "/\\ "):
        raise ConfigError(f"data.source: '{domain}' cannot name a domain; use letters, digits, dots, - and _")
    return domain


def _refuse_other_settings(target: Path, manifest: Manifest, settings: dict[str, Any]) -> None:
    changed = [
        f"{key}: {manifest['settings'].get(key)} -> {value}"
        for key, value in settings.items()
        if manifest["settings"].get(key) != value
    ]
    if changed:
        raise ConfigError(
            f"data.path: {target} was prepared with other settings ({'; '.join(changed)}); "
            "choose another path or remove it"
        )


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """Let one process on this machine prepare at a time; others wait and then find the work done."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
