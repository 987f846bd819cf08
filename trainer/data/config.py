"""What text a run trains on, and how it was turned into tokens."""

import math
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The corpus of a run. `launch.prepare` reads the first part of it, training the second."""

    path: str = "data/local_python"
    """Folder of the prepared corpus (tokenizer, indexed shards, manifest)."""
    source: str = "local_python"
    """`local_python` (text that is on every machine with Python), a jsonl, parquet or txt file, or a folder of them."""
    text_field: str = "text"
    """Column that holds the text."""
    domain_field: str = "domain"
    """Column that names the domain; where it is absent, the file's name without its ending is the domain."""
    tokenizer: str = "bpe"
    """`bpe` trains a byte-level BPE on the source; anything else is a Hugging Face tokenizer, by path or hub name."""
    vocab_size: int = 8192
    """Size of the trained vocabulary; a given tokenizer brings its own."""
    tokenizer_sample_mb: float = 8.0
    """Text the BPE is trained on, in MB, chosen by hash."""
    heldout_fraction: float = 0.02
    """Share of documents held out for evaluation, chosen by a hash of their text."""

    weights: dict[str, float] = field(default_factory=dict)
    """Share of training samples drawn from each domain; empty draws in proportion to the domains' tokens."""
    packing: Literal["split", "best_fit"] = "split"
    """How documents share rows: one stream cut into windows, or whole documents, as many as fit (with padding)."""
    num_workers: int = 0
    """Processes that read ahead; 0 reads in the training process."""

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        found = []
        for name in ("path", "source", "text_field", "domain_field", "tokenizer"):
            if not getattr(self, name):
                found.append(f"{name}: is empty")
        if self.tokenizer == "bpe" and not 257 <= self.vocab_size <= 1 << 20:
            found.append(f"vocab_size: {self.vocab_size} must be between 257 (every byte and one mark) and 1048576")
        if not (math.isfinite(self.tokenizer_sample_mb) and self.tokenizer_sample_mb > 0):
            found.append(f"tokenizer_sample_mb: {self.tokenizer_sample_mb} must be finite and positive")
        if not 0 < self.heldout_fraction < 1:
            found.append(f"heldout_fraction: {self.heldout_fraction} must be between 0 and 1")
        bad = {name: weight for name, weight in self.weights.items() if not (math.isfinite(weight) and weight >= 0)}
        found += [f"weights.{name}: {weight} must be finite and not negative" for name, weight in bad.items()]
        if self.weights and not bad and sum(self.weights.values()) <= 0:
            found.append("weights: at least one domain needs a positive weight")
        if self.num_workers < 0:
            found.append(f"num_workers: {self.num_workers} is negative")
        return found
