"""A prepared corpus, opened for training and evaluation.

A domain's documents lie end to end in one stream of tokens. Row j of a domain is tokens [jT, jT + T] of its stream:
T inputs and, shifted by one, T targets. Training rows are full; the last held-out row is padded, so that every
held-out token counts.

Shape letters: S samples, T sequence, D domains.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.config import DataConfig
from trainer.data.indexed import open_tokens
from trainer.data.order import block_quotas, locate
from trainer.data.prepare import Manifest, hash_file, preparation_settings, read_manifest, shard_prefix
from trainer.errors import CheckpointError, ConfigError

IGNORED_LABEL = -100


class Rows(NamedTuple):
    """Samples as the model wants them."""

    tokens_ST: Tensor  # int64
    labels_ST: Tensor  # int64, the next token; -100 where there is none
    domains_S: Tensor  # int64


class TokenCorpus:
    """All domains of one corpus, cut into rows of one length, blended by weight."""

    def __init__(
        self, folder: Path, manifest: Manifest, *, sequence_length: int, seed: int, weights: Mapping[str, float]
    ) -> None:
        self._length = sequence_length
        self._seed = seed
        self.fingerprint: str = manifest["fingerprint"]
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self.domain_names: tuple[str, ...] = tuple(manifest["domains"])
        self._train = [open_tokens(shard_prefix(folder, name, "train")) for name in self.domain_names]
        self._heldout = [open_tokens(shard_prefix(folder, name, "heldout")) for name in self.domain_names]
        self._rows_D = np.array([max(0, len(tokens) - 1) // sequence_length for tokens in self._train], dtype=np.int64)
        self._quotas_D = block_quotas(self._blend(weights))

    @classmethod
    def open(cls, config: DataConfig, *, sequence_length: int, seed: int, verify: bool = False) -> "TokenCorpus":
        """Open what `launch.prepare` wrote. `verify` reads every byte; sizes are always checked.

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
        return cls(folder, manifest, sequence_length=sequence_length, seed=seed, weights=config.weights)

    @property
    def domain_shares(self) -> tuple[float, ...]:
        """Share of the training rows that each domain provides."""
        return tuple(float(quota) for quota in self._quotas_D / self._quotas_D.sum())

    def train_batch(self, samples_S: NDArray[np.int64]) -> Rows:
        """The training samples with these numbers."""
        domains_S, rows_S = locate(samples_S, quotas_D=self._quotas_D, rows_D=self._rows_D, seed=self._seed)
        length = self._length
        streams = (self._train[domain] for domain in domains_S)
        windows_ST1 = np.stack(
            [stream[row * length : (row + 1) * length + 1] for stream, row in zip(streams, rows_S, strict=True)]
        ).astype(np.int64)
        return Rows(
            torch.from_numpy(windows_ST1[:, :-1].copy()),
            torch.from_numpy(windows_ST1[:, 1:].copy()),
            torch.from_numpy(domains_S),
        )

    def heldout_rows(self, domain: int) -> int:
        """Rows of a domain's held-out text, the padded last one included."""
        return -(-max(0, len(self._heldout[domain]) - 1) // self._length)

    def heldout_batch(self, domain: int, start: int, stop: int, *, at_least: int = 0) -> Rows:
        """Held-out rows [start, stop) of a domain, filled up to `at_least` rows with padding."""
        length, stream = self._length, self._heldout[domain]
        num_rows = max(stop - start, at_least)
        tokens_ST = torch.zeros(num_rows, length, dtype=torch.int64)
        labels_ST = torch.full((num_rows, length), IGNORED_LABEL, dtype=torch.int64)
        for index, row in enumerate(range(start, stop)):
            window = torch.from_numpy(stream[row * length : (row + 1) * length + 1].astype(np.int64))
            num_targets = len(window) - 1
            tokens_ST[index, :num_targets] = window[:-1]
            labels_ST[index, :num_targets] = window[1:]
        return Rows(tokens_ST, labels_ST, torch.full((num_rows,), domain, dtype=torch.int64))

    def _blend(self, weights: Mapping[str, float]) -> list[float]:
        unknown = sorted(weights.keys() - set(self.domain_names))
        if unknown:
            raise ConfigError(
                f"data.weights.{unknown[0]}: no such domain; the corpus has {', '.join(self.domain_names)}"
            )
        shares = [
            float(weights.get(name, 0.0)) if weights else float(rows)
            for name, rows in zip(self.domain_names, self._rows_D, strict=True)
        ]
        for name, share, rows, tokens in zip(self.domain_names, shares, self._rows_D, self._train, strict=True):
            if share > 0 and rows == 0:
                raise ConfigError(
                    f"data.weights.{name}: the domain has {len(tokens)} training tokens, less than one sample of "
                    f"{self._length}; lower train.sequence_length or set its weight to 0"
                )
        if not any(shares):
            raise ConfigError(
                f"train.sequence_length: no domain has {self._length + 1} training tokens; shorten it or add text"
            )
        return shares


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
