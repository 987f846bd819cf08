"""A prepared corpus, opened for training and evaluation. Which row a sample is, its plan says (trainer/data/plan.py).

A domain's documents lie end to end in one stream of tokens. A row takes T of them as inputs (trainer/data/packing.py
says which) and, shifted by one, as targets; every token is told which document it is from. With document masks no
target is asked for across a border. Held-out rows are packed like training rows, but none is left out at the end, so
that every held-out target counts.

Shape letters: S samples, T sequence, D domains.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from trainer.data.config import DataConfig
from trainer.data.indexed import IndexedTokens
from trainer.data.online import OnlinePlan
from trainer.data.order import Integers
from trainer.data.packing import Packing, Pieces, SplitPacking, pack_best_fit
from trainer.data.plan import Mixture, SamplePlan
from trainer.data.prepare import TOKENIZER, Manifest, hash_file, preparation_settings, read_manifest, shard_prefix
from trainer.data.tokenizer import load_tokenizer
from trainer.errors import CheckpointError, ConfigError

IGNORED_LABEL = -100
PADDING_DOCUMENT = -1


class Rows(NamedTuple):
    """Samples as the model wants them."""

    tokens_ST: Tensor  # int64
    labels_ST: Tensor  # int64, the next token; -100 where there is none
    domains_S: Tensor  # int64
    documents_ST: Tensor  # int64, number of the document in its domain's shard of the split; -1 at padding


class TokenCorpus:
    """All domains of one corpus, cut into rows of one length, blended by weight."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        sequence_length: int,
        seed: int,
        mixtures: Sequence[tuple[int, Mapping[str, float], str]],
        max_epochs: Mapping[str, float],
        packing: Literal["split", "best_fit"],
        mask_documents: bool,
    ) -> None:
        """`mixtures`: (first sample, weights, key in the configuration) of each phase, the first from 0 on."""
        assert mask_documents or packing == "split"
        self._folder = folder
        self._length = sequence_length
        self._seed, self._max_epochs = seed, max_epochs
        self._mask_documents = mask_documents
        self.fingerprint: str = manifest["fingerprint"]
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self.domain_names: tuple[str, ...] = tuple(manifest["domains"])
        self._train = [IndexedTokens(shard_prefix(folder, name, "train")) for name in self.domain_names]
        self._heldout = [IndexedTokens(shard_prefix(folder, name, "heldout")) for name in self.domain_names]
        self._train_rows = [_pack(shard, packing, sequence_length, partial=False) for shard in self._train]
        self._heldout_rows = [_pack(shard, packing, sequence_length, partial=True) for shard in self._heldout]
        self.rows_D = tuple(rows.num_rows for rows in self._train_rows)
        self._mixtures = [Mixture(start, self._blend(weights, key), key) for start, weights, key in mixtures]
        self.plan = SamplePlan(
            self.domain_names, self.rows_D, seed=seed, mixtures=self._mixtures, max_epochs=max_epochs
        )

    @classmethod
    def open(
        cls,
        config: DataConfig,
        *,
        sequence_length: int,
        seed: int,
        mask_documents: bool,
        steps: int = 1,
        global_batch_size: int = 1,
        verify: bool = False,
    ) -> "TokenCorpus":
        """Open what `launch.prepare` wrote. `verify` reads every byte; sizes are always checked.

        `mask_documents`: ask for no target across documents, as `model.document_mask` says. `steps` of
        `global_batch_size` samples are the run that `data.phases` are measured by.

        Raises ConfigError if the corpus is not prepared or was prepared otherwise, CheckpointError if files changed.
        """
        folder = Path(config.path)
        manifest = read_manifest(folder)
        if manifest is None:
            raise ConfigError(
                f"data.path: {folder} holds no prepared corpus; run python -m launch.prepare CONFIG first"
            )
        for key, value in preparation_settings(config).items():
            if manifest["settings"].get(key) != value:
                raise ConfigError(
                    f"data.{key}: the corpus in {folder} was prepared with {manifest['settings'].get(key)}, "
                    f"not {value}; prepare it again in another data.path"
                )
        for name, expected in manifest["files"].items():
            _check_file(folder / name, expected, verify=verify)
        return cls(
            folder,
            manifest,
            sequence_length=sequence_length,
            seed=seed,
            mixtures=[
                (0, config.sampling_weights, "data.weights"),
                *(
                    (
                        phase.first_sample(steps=steps, global_batch_size=global_batch_size),
                        phase.weights,
                        f"data.phases[{number}]",
                    )
                    for number, phase in enumerate(config.phases)
                ),
            ],
            max_epochs=config.epoch_caps,
            packing=config.packing,
            mask_documents=mask_documents,
        )

    @property
    def domain_shares(self) -> tuple[float, ...]:
        """Share of the first phase's samples that each domain provides."""
        return self.plan.phase(0).shares_D

    def sample_online(self, *, global_batch_size: int, delay: int) -> OnlinePlan:
        """Let weights change at step boundaries from now on; returns the plan that takes changes.

        Raises ConfigError with data.phases: two would set the weights.
        """
        if len(self._mixtures) > 1:
            raise ConfigError("data.phases: a hook sets the weights of the sampling; remove the phases or the hook")
        self.plan = plan = OnlinePlan(
            self.domain_names,
            self.rows_D,
            seed=self._seed,
            weights_D=self._mixtures[0].weights_D,
            max_epochs=self._max_epochs,
            global_batch_size=global_batch_size,
            delay=delay,
        )
        return plan

    def open_plan(self, state: Mapping[str, Any], sample: int) -> None:
        """Take the plan that a checkpoint before `sample` has, whichever kind it is."""
        if state["kind"] == OnlinePlan.kind:
            self.sample_online(global_batch_size=state["global_batch_size"], delay=0)
        self.plan.restore(state, sample)

    @cached_property
    def documents_per_row(self) -> int:
        """Most documents that share a training row. Looks at where every document begins, once."""
        return max(
            rows.most_documents(shard.document_starts())
            for shard, rows in zip(self._train, self._train_rows, strict=True)
        )

    def excerpts(self, samples: Sequence[tuple[int, int | None]], *, characters: int = 160) -> list[str]:
        """Beginnings of the texts of training samples: (row number, which document of the row, or None for the row)."""
        if not samples:
            return []
        found = []
        rows = self.train_batch(np.array([row for row, _ in samples], dtype=np.int64))
        for tokens_T, documents_T, (_, part) in zip(rows.tokens_ST, rows.documents_ST, samples, strict=True):
            own_T = documents_T >= 0
            if part is not None:
                own_T = documents_T == documents_T.unique_consecutive()[part]
            found.append(self._tokenizer.decode(tokens_T[own_T].tolist(), skip_special_tokens=True)[:characters])
        return found

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(str(self._folder / TOKENIZER))

    def train_batch(self, samples_S: Integers, located: tuple[Integers, Integers] | None = None) -> Rows:
        """The training samples with these numbers. `located`: their domains and rows, if the plan was asked already."""
        domains_S, rows_S = located or self.plan.locate(samples_S)
        batch = self._empty(domains_S)
        for index, (domain, row) in enumerate(zip(domains_S, rows_S, strict=True)):
            self._fill(batch, index, self._train[domain], self._train_rows[domain], int(row))
        return batch

    @property
    def has_heldout_text(self) -> bool:
        """Whether any domain has held-out text."""
        return any(rows.num_rows for rows in self._heldout_rows)

    def heldout_rows(self, domain: int) -> int:
        """Rows of a domain's held-out text, the padded ones included."""
        return self._heldout_rows[domain].num_rows

    def heldout_batch(self, domain: int, start: int, stop: int, *, at_least: int = 0) -> Rows:
        """Held-out rows [start, stop) of a domain, filled up to `at_least` rows with padding."""
        batch = self._empty(np.full(max(stop - start, at_least), domain, dtype=np.int64))
        for index, row in enumerate(range(start, stop)):
            self._fill(batch, index, self._heldout[domain], self._heldout_rows[domain], row)
        return batch

    def _empty(self, domains_S: Integers) -> Rows:
        shape = (len(domains_S), self._length)
        return Rows(
            torch.zeros(shape, dtype=torch.int64),
            torch.full(shape, IGNORED_LABEL, dtype=torch.int64),
            torch.from_numpy(domains_S),
            torch.full(shape, PADDING_DOCUMENT, dtype=torch.int64),
        )

    def _fill(self, batch: Rows, index: int, shard: IndexedTokens, packing: Packing, row: int) -> None:
        """Put a row's spans, one after the other, into row `index` of the batch."""
        tokens_T, labels_T, documents_T = (
            tensor[index].numpy() for tensor in (batch.tokens_ST, batch.labels_ST, batch.documents_ST)
        )
        begin = 0
        for start, stop in packing.spans(row):
            end = begin + stop - start
            window = shard.tokens[start : stop + 1]
            documents = shard.documents(start, stop + 1)
            tokens_T[begin:end] = window[:-1]
            labels_T[begin:end] = window[1:]
            documents_T[begin:end] = documents[:-1]
            if self._mask_documents:
                labels_T[begin:end][documents[1:] != documents[:-1]] = IGNORED_LABEL
            begin = end

    def pieces(self, domain: int) -> Pieces:
        """Which tokens of a domain's training stream are the inputs of each row."""
        return self._train_rows[domain].pieces()

    def document_starts(self, domain: int) -> Integers:
        """First token of each training document of a domain, and where the last one ends, int64 [N + 1]."""
        return np.append(self._train[domain].document_starts(), len(self._train[domain]))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, marks of the tokenizer included."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)

    def _blend(self, weights: Mapping[str, float], key: str) -> tuple[float, ...]:
        prefix = f"{key}.weights" if key != "data.weights" else key
        unknown = sorted(weights.keys() - set(self.domain_names))
        if unknown:
            raise ConfigError(f"{prefix}.{unknown[0]}: no such domain; the corpus has {', '.join(self.domain_names)}")
        shares = [
            float(weights.get(name, 0.0)) if weights else float(rows)
            for name, rows in zip(self.domain_names, self.rows_D, strict=True)
        ]
        for name, share, rows, tokens in zip(self.domain_names, shares, self.rows_D, self._train, strict=True):
            if share > 0 and rows == 0:
                raise ConfigError(
                    f"{prefix}.{name}: the domain has {len(tokens)} training tokens, less than one sample of "
                    f"{self._length}; lower train.sequence_length or set its weight to 0"
                )
        if not any(shares):
            raise ConfigError(
                f"train.sequence_length: no domain has {self._length + 1} training tokens; shorten it or add text"
            )
        return tuple(shares)


def _pack(shard: IndexedTokens, packing: str, length: int, *, partial: bool) -> Packing:
    if packing == "split":
        return SplitPacking(len(shard), length, partial)
    return pack_best_fit(shard.document_starts(), len(shard), length)


def _check_file(path: Path, expected: Mapping[str, object], *, verify: bool) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, the manifest lists it: restore it or prepare the corpus again")
    size = path.stat().st_size
    if size != expected["size"]:
        raise CheckpointError(
            f"{path} has {size} bytes, the manifest says {expected['size']}: restore it or prepare the corpus again"
        )
    if verify and hash_file(path) != expected["sha256"]:
        raise CheckpointError(f"{path} has changed since it was prepared: restore it or prepare the corpus again")
