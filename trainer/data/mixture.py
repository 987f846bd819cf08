"""Where a corpus comes from and what of it is kept: the sources of a mixture and the filters of documents."""

import math
import re
from dataclasses import dataclass
from typing import Literal

LOCAL_PYTHON = "local_python"
HUB = "hub:"
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Which documents are left out. Exact copies of an earlier document always are."""

    min_characters: int = 1
    """Shorter documents are dropped; 1 drops empty ones."""
    max_characters: int = 0
    """Longer documents are dropped; 0 sets no limit."""
    min_tokens: int = 0
    """Documents of fewer tokens, the end mark not counted, are dropped."""
    max_tokens: int = 0
    """Documents of more tokens are dropped; 0 sets no limit."""
    near_duplicates: float = 0.0
    """Drop a document whose 5-token shingles have at least this Jaccard similarity, as MinHash estimates it, to those
    of an earlier one (0.8 is usual); 0 does not look. Costs 512 bytes of disk a document while preparing."""

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        found = []
        for kind in ("characters", "tokens"):
            least, most = getattr(self, f"min_{kind}"), getattr(self, f"max_{kind}")
            if least < 0:
                found.append(f"min_{kind}: {least} is negative")
            if most < 0 or 0 < most < least:
                found.append(f"max_{kind}: {most} must be 0 (no limit) or at least min_{kind} ({least})")
        if not (self.near_duplicates == 0 or 0.5 <= self.near_duplicates <= 1):
            found.append(f"near_duplicates: {self.near_duplicates} must be 0 (off) or between 0.5 and 1")
        return found

    def length_problem(self, length: int, unit: Literal["characters", "tokens"]) -> str:
        """Name of the option that drops a document of this length, or nothing."""
        least, most = f"min_{unit}", f"max_{unit}"
        if length < getattr(self, least):
            return least
        return most if 0 < getattr(self, most) < length else ""


@dataclass(frozen=True, kw_only=True)
class DomainConfig:
    """One domain of a mixture: all documents of one source."""

    source: str = ""
    """A file or folder of jsonl, json, txt, parquet, arrow or tar (WebDataset), `local_python`, or `hub:owner/name`."""
    revision: str = ""
    """Of a hub source, and only there: the commit hash, so that the corpus is the same for ever."""
    subset: str = ""
    """Of a hub source: its configuration, where it has several."""
    split: str = "train"
    """Of a hub source: the split."""
    streaming: bool = True
    """Of a hub source: read while downloading; otherwise it is downloaded whole, into the Hugging Face cache, first."""
    text_field: str = ""
    """Column of the text, or column.field in nested ones (json.text in a tar); empty: data.text_field."""
    min_characters: int | None = None
    """Instead of data.filters.min_characters."""
    max_characters: int | None = None
    """Instead of data.filters.max_characters."""
    weight: float | None = None
    """Default of data.weights for this domain; all domains of a mixture have one or none has."""
    max_epochs: float = 0.0
    """Default of data.max_epochs for this domain; 0 sets no cap."""

    @property
    def is_hub(self) -> bool:
        return self.source.startswith(HUB)

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        found = []
        if not self.source:
            found.append("source: is empty; name a file, a folder, hub:owner/name or local_python")
        if self.is_hub and not _COMMIT.fullmatch(self.revision):
            found.append(
                f"revision: '{self.revision}' must be the 40 hexadecimal digits of a commit of {self.source}; a branch "
                "or tag can move"
            )
        for name, default in (("revision", ""), ("subset", ""), ("split", "train"), ("streaming", True)):
            if not self.is_hub and getattr(self, name) != default:
                found.append(f"{name}: only hub: sources read it")
        if self.weight is not None and not (math.isfinite(self.weight) and self.weight >= 0):
            found.append(f"weight: {self.weight} must be finite and not negative")
        if not (math.isfinite(self.max_epochs) and self.max_epochs >= 0):
            found.append(f"max_epochs: {self.max_epochs} must be finite and not negative")
        return found


def domain_name_problem(name: str) -> str:
    """Why a domain cannot be called so (names are names of files), or nothing."""
    if name and name.isprintable() and len(name) <= 100 and name[0] != "." and not any(mark in name for mark in "/\\ "):
        return ""
    return f"'{name[:100]}' cannot name a domain; use letters, digits, dots, - and _"
