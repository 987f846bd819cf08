"""What a prepared corpus says of itself: its manifest, and whether it is what a configuration asks for."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trainer.data.config import DataConfig
from trainer.data.parts import Part
from trainer.data.shards import Shard
from trainer.errors import CheckpointError, ConfigError

FORMAT = 2
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
SOURCES = "sources.json"
"""Size of each source file; beside the manifest, which every rank reads, because there may be a million."""
SPLITS = ("train", "heldout")
_PREPARATION_FIELDS = (
    "source",
    "domains",
    "text_field",
    "domain_field",
    "tokenizer",
    "vocab_size",
    "tokenizer_sample_mb",
    "heldout_fraction",
    "filters",
    "on_bad_document",
)
_SAMPLING_FIELDS = ("weight", "max_epochs")  # of a domain of the mixture: they may change between runs

Manifest = dict[str, Any]


def preparation_settings(config: DataConfig) -> dict[str, Any]:
    """The settings the prepared files depend on."""
    plain = asdict(config)
    settings = {name: plain[name] for name in _PREPARATION_FIELDS}
    settings["domains"] = {
        name: {key: value for key, value in domain.items() if key not in _SAMPLING_FIELDS}
        for name, domain in plain["domains"].items()
    }
    return settings


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
    raise ConfigError(
        f"{folder / MANIFEST} {problem}; prepare the corpus again: remove it, or choose another data.path"
    )


def shard_prefix(folder: Path, domain: str, split: str) -> Path:
    """Where the shard of a domain and split lies, without its ending."""
    return folder / f"{domain}-{split}"


def hash_file(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_still_asked_for(target: Path, manifest: Manifest, settings: Mapping[str, Any]) -> None:
    """Refuse to take a prepared corpus for one of other settings, with damaged files, or of a source that changed.

    Only sizes are compared, and the source may be gone: tokens are kept so that the text need not be.
    Raises ConfigError for other settings, CheckpointError for changed files.
    """
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
    for name, expected in manifest["files"].items():
        size = _size(target / name)
        if size != expected["size"]:
            found = "is missing" if size is None else f"has {size} bytes, the manifest says {expected['size']}"
            raise CheckpointError(f"{target / name} {found}: restore it, or remove {target} and prepare it again")
    try:
        sources = json.loads((target / SOURCES).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{target / SOURCES} cannot be read ({error}): remove {target}, prepare again") from error
    for name, size in sources.items():
        now = _size(Path(name))
        if now is not None and now != size:
            raise CheckpointError(
                f"{name} has {now} bytes, it had {size} when {target} was prepared from it: restore it, "
                "or prepare in another data.path"
            )


def build_manifest(
    config: DataConfig, parts: Sequence[Part], shards: Sequence[Shard], tokenizer: Path, vocab_size: int, end: int
) -> Manifest:
    """The manifest of a corpus made of these shards.

    Raises ConfigError if there is nothing to train on, or not for a domain of a mixture.
    """
    dropped: dict[str, dict[str, int]] = {}

    def count(domain: str, reason: str, number: int) -> None:
        if number:
            reasons = dropped.setdefault(domain, {})
            reasons[reason] = reasons.get(reason, 0) + number

    for part in parts:
        for domain, reasons in part.dropped.items():
            for reason, number in reasons.items():
                count(domain, reason, number)
    domains: dict[str, dict[str, Any]] = {}
    for shard in shards:
        count(shard.domain, "duplicate", shard.duplicates)
        count(shard.domain, "near_duplicate", shard.near_duplicates)
        counts = domains.setdefault(shard.domain, {})
        counts[shard.split] = {"documents": shard.documents, "tokens": shard.tokens}
        counts["bytes"] = counts.get("bytes", 0) + shard.text_bytes
    domains = {
        name: {split: counts[split] for split in SPLITS} | {"bytes": counts["bytes"]}
        for name, counts in domains.items()
    }
    dropped = {domain: dict(sorted(reasons.items())) for domain, reasons in sorted(dropped.items())}
    _check_not_empty(config, domains, dropped, rows=sum(part.rows for part in parts))
    files = {name: facts for shard in shards for name, facts in shard.files.items()}
    files[TOKENIZER] = {"size": tokenizer.stat().st_size, "sha256": hash_file(tokenizer)}
    files = dict(sorted(files.items()))
    return {
        "format": FORMAT,
        "settings": preparation_settings(config),
        "tokenizer": {"file": TOKENIZER, "vocab_size": vocab_size, "end_of_document": end},
        "domains": domains,
        "dropped": dropped,
        "duplicates_dropped": sum(reasons.get("duplicate", 0) for reasons in dropped.values()),
        "bad_documents": [problem for part in parts for problem in part.bad][:20],
        "files": files,
        "fingerprint": hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest(),
        "versions": {name: version(name) for name in ("tokenizers", "datasets", "megatron-core", "rensa")},
    }


def _check_not_empty(
    config: DataConfig, domains: dict[str, Any], dropped: dict[str, dict[str, int]], *, rows: int
) -> None:
    if not rows:
        raise ConfigError(f"data.source: {_source(config)} has no document; give a source with text")
    for name in config.domains or [""]:
        training = [counts["train"]["documents"] for domain, counts in domains.items() if not name or domain == name]
        if not sum(training):
            why = ", ".join(f"{n} {reason}" for reasons in dropped.values() for reason, n in reasons.items())
            key = f"data.domains.{name}" if name else "data.source"
            raise ConfigError(
                f"{key}: {_source(config, name)} has no document to train on (dropped: {why or 'none'}); add text, "
                "or change data.filters or data.heldout_fraction"
            )


def _source(config: DataConfig, domain: str = "") -> str:
    if domain:
        return config.domains[domain].source
    return ", ".join(entry.source for entry in config.domains.values()) or config.source


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
