"""The embedded corpus: real text that lies on every machine where this project is installed.

Seven domains that differ in language and style. Files are visited in an order drawn by a hash of their path, so that
a cap on a domain's size takes a spread of files and not the first letters of the alphabet. Nothing is downloaded;
the text depends on the installed packages, so two machines agree on it only if their environments agree.
"""

import ast
import hashlib
import site
import sysconfig
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

_MB = 1_000_000
_MAX_DOCUMENT_BYTES = 100_000  # larger files are tables and generated code
_MIN_DOCUMENT_CHARACTERS = 200

Text = tuple[str, str]
"""(text, domain)"""


def local_python_documents(cap_scale: float = 1.0) -> Iterator[Text]:
    """Every document with its domain, in a fixed order. `cap_scale` shrinks the corpus, for tests."""
    for domain, (cap_bytes, texts) in _DOMAINS.items():
        remaining = cap_bytes * cap_scale
        for text in texts():
            if len(text) < _MIN_DOCUMENT_CHARACTERS:
                continue
            remaining -= len(text.encode())
            if remaining < 0:
                break
            yield text, domain


def _python_code() -> Iterator[str]:
    stdlib = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idlelib", "pydoc_data", "encodings", "__pycache__"}
    yield from _texts(path for path in stdlib.rglob("*.py") if not skipped & set(path.relative_to(stdlib).parts))


def _docstrings() -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]
    folders = [Path(sysconfig.get_path("stdlib")), *_package_folders()]
    for path in _spread(path for folder in folders for path in folder.rglob("*.py") if "test" not in str(path)):
        source = _read(path)
        if source is None or '"""' not in source:
            continue
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
        yield "\n\n".join(text for text in found if text)


def _package_pages() -> Iterator[str]:
    for folder in _package_folders():
        for path in _spread(folder.glob("*.dist-info/METADATA")):
            text = _read(path)
            if text is not None:
                yield text.partition("\n\n")[2]  # after the header: the package's own description
        yield from _texts(path for ending in ("md", "rst") for path in folder.rglob(f"*.{ending}"))


def _c_family() -> Iterator[str]:
    folders = [Path(sysconfig.get_path("include")), *_package_folders()]
    endings = ("h", "hpp", "cuh", "cpp", "cu")
    yield from _texts(path for folder in folders for ending in endings for path in folder.rglob(f"*.{ending}"))


def _type_stubs() -> Iterator[str]:
    yield from _texts(path for folder in _package_folders() for path in folder.rglob("*.pyi"))


def _licences() -> Iterator[str]:
    for folder in _package_folders():
        names = ("licen[cs]e*", "LICEN[CS]E*", "NOTICE*", "COPYING*")
        yield from _texts(path for name in names for path in folder.rglob(f"*.dist-info/**/{name}") if path.is_file())


def _character_names() -> Iterator[str]:
    for start in range(0, 0x30000, 0x80):
        lines = []
        for code in range(start, start + 0x80):
            name = unicodedata.name(chr(code), "")
            if name and not name.startswith(("CJK UNIFIED", "HANGUL SYLLABLE")):
                lines.append(f"U+{code:04X} {unicodedata.category(chr(code))} {name.capitalize()}")
        yield "\n".join(lines)


_DOMAINS: dict[str, tuple[int, Callable[[], Iterator[str]]]] = {
    "python": (6 * _MB, _python_code),
    "docstrings": (6 * _MB, _docstrings),
    "c_family": (7 * _MB, _c_family),
    "type_stubs": (3 * _MB, _type_stubs),
    "package_pages": (2 * _MB, _package_pages),
    "character_names": (2 * _MB, _character_names),
    "licences": (1 * _MB, _licences),
}
"""Bytes kept at most, and where they come from."""

MOST_BYTES = sum(cap_bytes for cap_bytes, _ in _DOMAINS.values())
"""Of the whole corpus."""


def _package_folders() -> list[Path]:
    return sorted({Path(sysconfig.get_path("purelib")), *map(Path, site.getsitepackages())})


def _spread(paths: Iterable[Path]) -> list[Path]:
    # Relative to its package folder, a path is the same in every virtual environment.
    folders = [*_package_folders(), Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("include"))]

    def key(path: Path) -> bytes:
        home = next((folder for folder in folders if path.is_relative_to(folder)), path.parent)
        return hashlib.sha256(str(path.relative_to(home)).encode()).digest()

    return sorted(paths, key=key)


def _texts(paths: Iterable[Path]) -> Iterator[str]:
    for path in _spread(paths):
        text = _read(path)
        if text is not None:
            yield text


def _read(path: Path) -> str | None:
    """The file's text, or None if it is too large, not UTF-8, or gone."""
    try:
        if path.stat().st_size > _MAX_DOCUMENT_BYTES:
            return None
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
