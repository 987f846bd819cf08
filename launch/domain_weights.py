"""Find domain weights with a small proxy: `python -m launch.domain_weights CONFIG --rule doge --out weights.yaml`.

CONFIG describes the proxy: its model, corpus, train.steps, learning rate and seed; each step takes
train.micro_batch_size rows of every domain. `--rule doremi` also needs --reference RUN, a finished run of a model of
that size on the same corpus, whose loss on each token the proxy's is compared with. The result can be included by
another config (`include: [weights.yaml]`): it sets data.weights to the mean weights over the steps. One process, on the
GPU if there is one. The balancing of hooks.expert_bias applies to the proxy too; auxiliary losses are refused.
"""

import argparse
import csv
import dataclasses
import errno
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from rich.table import Table
from torch import Tensor, nn

from configs.hooks import build_hooks
from configs.loader import load_run_config
from configs.schema import RunConfig
from launch._cli import run_command
from launch._console import terminal
from launch._corpus import open_corpus
from launch._trained import load_trained_model
from moe.loss_head import IGNORED_LABEL
from moe.model import MoEDecoder
from reweighting.proxy import DomainBatch, ProxyConfig, proxy_step
from trainer import ranks
from trainer.data.corpus import Rows, TokenCorpus
from trainer.errors import ConfigError, StorageError
from trainer.hooks import HookList, RunContext, StepContext, StepResult
from trainer.metrics import MetricBuffer
from trainer.optim import build_adamw
from trainer.schedule import learning_rate

log = logging.getLogger("evenkeel")

_ADVICE_EVERY = 50  # steps between lines of progress


def main(argv: list[str]) -> int:
    """Train the proxy and write the weights; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.domain_weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file of the proxy's run")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rule", choices=("doge", "doremi"), required=True)
    parser.add_argument("--reference", type=Path, help="doremi: run folder of the reference model")
    parser.add_argument(
        "--eta", type=float, default=ProxyConfig.eta, help="doremi: size of a step (default %(default)s)"
    )
    parser.add_argument(
        "--mu", type=float, default=ProxyConfig.mu, help="doge: larger moves less (default %(default)s)"
    )
    parser.add_argument("--smoothing", type=float, default=ProxyConfig.smoothing, help="share spread evenly")
    parser.add_argument("--out", type=Path, required=True, help="YAML file; a .csv beside it has every step's weights")
    options = parser.parse_intermixed_args(argv)
    _check(options)
    _log_progress()

    config = load_run_config(options.config, options.overrides, world_size=None)  # the proxy is whole on one rank
    if config.model.aux_loss.any or config.model.has_mtp:
        raise ConfigError("model: a proxy is trained without auxiliary losses; set aux_loss and mtp_weight to 0")
    corpus = open_corpus(config)
    reference = _reference(options.reference, corpus) if options.rule == "doremi" else None
    proxy = ProxyConfig(
        rule=options.rule, eta=options.eta, mu=options.mu, smoothing=options.smoothing,
        clip_norm=config.optimizer.clip_norm,
    )  # fmt: skip
    course = find_weights(config, corpus, proxy, reference)
    mean_D = torch.stack(course).mean(dim=0)
    weights = {name: round(float(weight), 6) for name, weight in zip(corpus.domain_names, mean_D, strict=True)}
    options.out.write_text(yaml.safe_dump({"data": {"weights": weights}}, sort_keys=False))
    with options.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *corpus.domain_names])
        writer.writerows([n, *alpha_D.tolist()] for n, alpha_D in enumerate(course, start=1))
    terminal().print(_table(corpus, mean_D, course[-1]))
    sys.stdout.write(f"wrote {options.out}; train with include: [{options.out}]\n")
    return 0


def find_weights(
    config: RunConfig, corpus: TokenCorpus, proxy: ProxyConfig, reference: nn.Module | None
) -> list[Tensor]:
    """The domain weights of every step, float64 [D] each."""
    device = ranks.device()
    torch.manual_seed(config.seed)
    model = MoEDecoder(config.model, vocab_size=corpus.vocab_size).to(device)
    optimizer = build_adamw(model, config.optimizer, device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    by_domain = [
        open_corpus(
            dataclasses.replace(
                config, data=dataclasses.replace(config.data, weights={name: 1.0}, phases=[], max_epochs={})
            )
        )
        for name in corpus.domain_names
    ]
    balancing = _balancing(config, model, corpus, device)
    alpha_D = torch.full((len(by_domain),), 1 / len(by_domain), dtype=torch.float64, device=device)
    course: list[Tensor] = []

    def apply_gradients() -> None:
        if config.optimizer.clip_norm:
            nn.utils.clip_grad_norm_(parameters, config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    for step in range(config.train.steps):
        rate = learning_rate(config.schedule, step, peak=config.optimizer.learning_rate, total_steps=config.train.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        size = config.train.micro_batch_size
        rows = [each.train_batch(np.arange(step * size, (step + 1) * size)) for each in by_domain]
        batches = [_forward(model, reference, each, device) for each in rows]
        alpha_D = proxy_step(parameters, alpha_D, batches, proxy, learning_rate=rate, step=apply_gradients)
        balancing.after_step(_context(step, rows, batches), StepResult(applied=True, reason=""))
        course.append(alpha_D.cpu())
        if (step + 1) % _ADVICE_EVERY == 0:
            shown = ", ".join(f"{n} {a:.3f}" for n, a in zip(corpus.domain_names, alpha_D.tolist(), strict=True))
            log.info("step %d of %d: %s", step + 1, config.train.steps, shown)
    return course


def _forward(model: nn.Module, reference: nn.Module | None, rows: Rows, device: torch.device) -> DomainBatch:
    tokens, labels, documents = (each.to(device) for each in (rows.tokens_ST, rows.labels_ST, rows.documents_ST))
    reference_losses = None
    if reference is not None:
        with torch.no_grad():
            reference_losses = reference(tokens, labels, documents)
    return DomainBatch(model(tokens, labels, documents), reference_losses, labels != IGNORED_LABEL)


def _balancing(config: RunConfig, model: nn.Module, corpus: TokenCorpus, device: torch.device) -> HookList:
    """The expert bias of the configuration, if it has one."""
    hooks = build_hooks({k: v for k, v in config.hooks.items() if v["hook"] in ("expert_bias",)})
    hooks.on_start(
        RunContext(
            model=model, total_steps=config.train.steps, global_batch_size=config.train.global_batch_size,
            domain_names=corpus.domain_names, domain_shares=corpus.domain_shares, run_dir=Path(config.folder),
            device=device, seed=config.seed, samples_per_row=1, has_weights=False,
            is_frozen=False, excerpts=corpus.excerpts,
        )
    )  # fmt: skip
    return hooks


def _context(step: int, rows: Sequence[Rows], batches: Sequence[DomainBatch]) -> StepContext:
    tokens_B = torch.cat([batch.counted_bT.sum(dim=1) for batch in batches])
    ids_B = torch.arange(len(tokens_B), device=tokens_B.device)
    return StepContext(
        step=step + 1, applied_steps=step, sample_ids_B=ids_B, parts_B=torch.zeros_like(ids_B),
        domains_B=torch.cat([each.domains_S for each in rows]).to(ids_B.device), tokens_B=tokens_B,
        losses_B=torch.cat([batch.losses_bT.detach().sum(dim=1) for batch in batches]) / tokens_B.clamp(min=1),
        own_S=ids_B, recorder=MetricBuffer(),
    )  # fmt: skip


def _reference(run_dir: Path, corpus: TokenCorpus) -> nn.Module:
    _, own_corpus, model, _ = load_trained_model(run_dir, ranks.device())
    if own_corpus.fingerprint != corpus.fingerprint:
        raise ConfigError(f"--reference: {run_dir} was trained on another corpus; train a reference on this one")
    return model.eval()


def _check(options: argparse.Namespace) -> None:
    problems = []
    if options.rule == "doremi" and options.reference is None:
        problems.append("--reference: rule doremi needs the run of a reference model; train one first")
    if options.rule == "doge" and options.reference is not None:
        problems.append("--reference: rule doge needs none; remove it")
    if not 0 < options.eta < float("inf"):
        problems.append(f"--eta: {options.eta} must be finite and positive")
    if not 0 < options.mu < float("inf"):
        problems.append(f"--mu: {options.mu} must be finite and positive")
    if not 0 <= options.smoothing < 1:
        problems.append(f"--smoothing: {options.smoothing} must be in [0, 1)")
    if options.out.suffix not in (".yaml", ".yml"):
        problems.append(f"--out: {options.out} must end in .yaml; a .csv beside it has every step's weights")
    if problems:
        raise ConfigError(*problems)
    try:  # before hours of training
        options.out.parent.mkdir(parents=True, exist_ok=True)
        if options.out.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        with tempfile.TemporaryFile(dir=options.out.parent):
            pass
    except OSError as error:
        raise StorageError(f"--out: {options.out}: {error.strerror}; name a file that can be written") from error


def _log_progress() -> None:
    """Lines of ours on stderr; the root logger would have those of every library."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.setLevel(logging.INFO)
    log.handlers = [handler]
    log.propagate = False


def _table(corpus: TokenCorpus, mean_D: Tensor, last_D: Tensor) -> Table:
    table = Table(title="domain weights")
    for column in ("domain", "share of the corpus", "mean over the steps", "last step"):
        table.add_column(column, justify="left" if column == "domain" else "right")
    for name, share, mean, last in zip(
        corpus.domain_names, corpus.domain_shares, mean_D.tolist(), last_D.tolist(), strict=True
    ):
        table.add_row(name, f"{share:.4f}", f"{mean:.4f}", f"{last:.4f}")
    return table


if __name__ == "__main__":
    sys.exit(run_command(main))
