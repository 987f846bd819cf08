"""What text a run trains on, and how it was turned into tokens."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

from trainer.data.mixture import HUB, LOCAL_PYTHON, DomainConfig, FilterConfig, domain_name_problem

MORE_HELDOUT = "split the text into more documents, or raise data.heldout_fraction"
"""What to do where no document is held out."""


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """A mixture that replaces the one before. Exactly one of the three `from_` says where it begins."""

    from_step: int | None = None
    """Optimizer steps that come before it."""
    from_sample: int | None = None
    """Samples that come before it."""
    from_share: float | None = None
    """Share of train.steps that comes before it, so that it moves when the run is made longer: 0.9 for a last tenth."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of its samples drawn from each domain, as in `data.weights`."""

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        found = weight_problems(self.weights)
        begins = {
            n: getattr(self, n) for n in ("from_step", "from_sample", "from_share") if getattr(self, n) is not None
        }
        if len(begins) != 1:
            found.append(f"from_step: give exactly one of from_step, from_sample and from_share, not {len(begins)}")
        for name, value in begins.items():
            if name == "from_share":
                if not 0 < value < 1:
                    found.append(f"{name}: {value} must be between 0 and 1")
            elif value < 1:
                found.append(f"{name}: {value} must be at least 1; what comes first is data.weights")
        return found

    def first_sample(self, *, steps: int, global_batch_size: int) -> int:
        """Where it begins in a run of so many steps."""
        if self.from_sample is not None:
            return self.from_sample
        if self.from_step is not None:
            return self.from_step * global_batch_size
        assert self.from_share is not None
        return round(self.from_share * steps * global_batch_size)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The corpus of a run. `launch.prepare` reads the first part of it, training the second."""

    path: str = "data/local_python"
    """Folder of the prepared corpus (tokenizer, indexed shards, manifest)."""
    source: str = LOCAL_PYTHON
    """`local_python` (text that is on every machine with Python), a jsonl, json, txt, parquet, arrow or tar file (also
    .gz, .zst, .bz2 and .xz of jsonl and txt), or a folder of them."""
    domains: dict[str, DomainConfig] = field(default_factory=dict)
    """A mixture instead of one source: domains by name, each with its own source; see configs/mixtures/."""
    text_field: str = "text"
    """Column that holds the text, or column.field in nested ones."""
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
    filters: FilterConfig = field(default_factory=FilterConfig)
    """Which documents are left out."""
    on_bad_document: Literal["stop", "skip"] = "stop"
    """What a document that is not text (or the unreadable rest of a file) does: end the preparation, or be counted."""

    weights: dict[str, float] = field(default_factory=dict)
    """Share of training samples drawn from each domain; empty draws in proportion to the domains' tokens."""
    phases: list[PhaseConfig] = field(default_factory=list)
    """Mixtures that take over later in the run (a curriculum, an annealing), in the order they come."""
    max_epochs: dict[str, float] = field(default_factory=dict)
    """Most passes over a domain's rows; absent or 0: no limit. Beyond, its share goes to the others in proportion."""
    packing: Literal["split", "best_fit"] = "split"
    """How documents share rows: one stream cut into windows, or whole documents, as many as fit (with padding)."""
    num_workers: int = 0
    """Processes that read ahead; 0 reads in the training process. More than the micro-batches of `prefetch_steps` have
    nothing to do and are not started."""
    prefetch_steps: int = 2
    """Steps that these processes read ahead."""
    sampling_delay: int = 4
    """Steps from a hook's change of the sampling to the first one it acts on; at least `prefetch_steps`."""

    def problems(self) -> list[str]:
        """Every inconsistency, one line each, beginning with the field's name."""
        found = []
        for name in ("path", "source", "text_field", "domain_field", "tokenizer"):
            if not getattr(self, name):
                found.append(f"{name}: is empty")
        if self.path and Path(self.path).name in ("", ".."):
            found.append(f"path: {self.path} cannot be made anew; name a folder in it")
        if self.tokenizer == "bpe" and not 257 <= self.vocab_size <= 1 << 20:
            found.append(f"vocab_size: {self.vocab_size} must be between 257 (every byte and one mark) and 1048576")
        if not (math.isfinite(self.tokenizer_sample_mb) and self.tokenizer_sample_mb > 0):
            found.append(f"tokenizer_sample_mb: {self.tokenizer_sample_mb} must be finite and positive")
        if not 0 < self.heldout_fraction < 1:
            found.append(f"heldout_fraction: {self.heldout_fraction} must be between 0 and 1")
        found += weight_problems(self.sampling_weights)
        for number, phase in enumerate(self.phases):
            found += [f"phases[{number}].{line}" for line in phase.problems()]
        found += [
            f"max_epochs.{name}: {epochs} must be finite and not negative"
            for name, epochs in self.max_epochs.items()
            if not (math.isfinite(epochs) and epochs >= 0)
        ]
        if self.num_workers < 0:
            found.append(f"num_workers: {self.num_workers} is negative")
        if self.prefetch_steps < 1:
            found.append(f"prefetch_steps: {self.prefetch_steps} must be at least 1")
        if self.sampling_delay < self.prefetch_steps:
            found.append(
                f"sampling_delay: {self.sampling_delay} must be at least prefetch_steps ({self.prefetch_steps}): "
                "what is read ahead cannot be changed"
            )
        return found + [f"filters.{line}" for line in self.filters.problems()] + self._domain_problems()

    @property
    def sampling_weights(self) -> dict[str, float]:
        """`weights`, with the mixture's where they say nothing."""
        defaults = {name: domain.weight for name, domain in self.domains.items() if domain.weight is not None}
        return defaults | self.weights

    @property
    def epoch_caps(self) -> dict[str, float]:
        """`max_epochs`, with the mixture's where they say nothing; only caps, no zeros."""
        caps = {name: domain.max_epochs for name, domain in self.domains.items()} | self.max_epochs
        return {name: cap for name, cap in caps.items() if cap}

    def filters_of(self, domain: str) -> FilterConfig:
        """The filters, as a domain of the mixture changes them."""
        entry = self.domains.get(domain, DomainConfig())
        changes = {"min_characters": entry.min_characters, "max_characters": entry.max_characters}
        return replace(self.filters, **{name: value for name, value in changes.items() if value is not None})

    def _domain_problems(self) -> list[str]:
        if not self.domains:
            if self.source.startswith(HUB):
                return [f"source: {self.source} needs a revision; make it a domain of data.domains"]
            return []
        found = []
        if self.source != LOCAL_PYTHON:
            found.append("source: is not read beside data.domains; make it one of them")
        if self.domain_field != "domain":
            found.append("domain_field: is not read beside data.domains, whose names are the domains")
        without = [name for name, domain in self.domains.items() if domain.weight is None]
        if 0 < len(without) < len(self.domains) and set(without) - set(self.weights):
            found.append(f"domains.{without[0]}.weight: is missing; give every domain a weight, or none")
        for name, domain in self.domains.items():
            lines = domain.problems() + [line for line in self.filters_of(name).problems() if "characters" in line]
            if problem := domain_name_problem(name):
                lines.append(problem)
            found += [f"domains.{name}.{line}" for line in lines]
        return found

    def phase_problems(self, *, steps: int, global_batch_size: int) -> list[str]:
        """Phases of a run of so many steps that do not begin one after the other."""
        starts = [phase.first_sample(steps=steps, global_batch_size=global_batch_size) for phase in self.phases]
        return [
            f"phases[{number}]: begins with sample {start}, not after phase {number - 1} (sample {before}); "
            "list them in the order they come"
            for number, (before, start) in enumerate(pairwise(starts), start=1)
            if start <= before
        ]


def weight_problems(weights: Mapping[str, float]) -> list[str]:
    """What keeps weights from being a mixture."""
    bad = {name: weight for name, weight in weights.items() if not (math.isfinite(weight) and weight >= 0)}
    found = [f"weights.{name}: {weight} must be finite and not negative" for name, weight in bad.items()]
    if weights and not bad and sum(weights.values()) <= 0:
        found.append("weights: at least one domain needs a positive weight")
    return found
