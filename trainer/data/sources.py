"""Documents and their domains, from files or from the embedded corpus. The one importer of `datasets`."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from trainer.data.config import DataConfig
from trainer.data.local_python import local_python_documents
from trainer.errors import ConfigError

_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
_PACKED = (".gz", ".zst", ".xz")


class Document(NamedTuple):
    """One text of one domain."""

    text: str
    domain: str


def read_documents(config: DataConfig) -> Iterator[Document]:
    """All documents of `config.source`, in a fixed order.

    Raises ConfigError that names the file and row of a document that is missing, unreadable or not text.
    """
    if config.source == "local_python":
        yield from (Document(text, domain) for text, domain in local_python_documents())
        return
    for path in _files(Path(config.source)):
        yield from _read_file(path, config)


def _files(source: Path) -> list[Path]:
    if not source.exists():
        raise ConfigError(f"data.source: {source} does not exist; give a file, a folder, or local_python")
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    known = [path for path in files if _loader(path)]
    if not known:
        raise ConfigError(f"data.source: {source} has no {', '.join(_LOADERS)} file")
    return known


def _loader(path: Path) -> str | None:
    suffix = Path(path.stem).suffix if path.suffix in _PACKED else path.suffix
    return _LOADERS.get(suffix)


def _read_file(path: Path, config: DataConfig) -> Iterator[Document]:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    loader = _loader(path)
    assert loader is not None
    if path.stat().st_size == 0:
        return
    options = {"sample_by": "document"} if loader == "text" else {}
    text_field = "text" if loader == "text" else config.text_field
    fallback_domain = path.name.split(".")[0]
    row = 0
    try:
        rows = datasets.load_dataset(loader, data_files=str(path), split="train", streaming=True, **options)
        for row, record in enumerate(rows, start=1):
            if text_field not in record:
                raise ConfigError(
                    f"{path}: row {row} has no field '{text_field}' (fields: {', '.join(record)}); set data.text_field"
                )
            text, domain = record[text_field], record.get(config.domain_field)
            if not isinstance(text, str):
                raise ConfigError(f"{path}: row {row}: field '{text_field}' holds {type(text).__name__}, not text")
            yield Document(text, fallback_domain if domain is None else str(domain))
    except ConfigError:
        raise
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: is not UTF-8 text after row {row} ({error.reason}); convert or remove it"
        ) from error
    except Exception as error:  # `datasets` wraps parser errors of many libraries
        cause = error.__cause__ or error
        line = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise ConfigError(f"{path}: cannot be read as {loader} after row {row} ({line})") from error
