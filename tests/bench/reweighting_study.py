"""Where loss-based weights pay and where they do not: `python -m tests.bench.reweighting_study [--seeds 3] [--table]`.

Small models on real text (the quickstart's, or `--source`), one rank, the same initial weights and the same samples
for every strategy of a seed, so that differences are paired. Three corpora:

- clean: the text as it is;
- corrupted: one training sample in ten comes from documents whose bytes were shuffled;
- redundant: one training sample in two comes from 20 documents that are seen again and again.

Global batches of 16 and 128, with unweighted warm-up (a quarter of the steps at r = 100) and, on clean text, without.
Prints Markdown tables of held-out loss and writes them to runs/reweighting/tables.md. Held-out documents
are the same, and clean, in all three. Runs that are there already are not repeated, so it can be stopped and continued.
"""

import argparse
import hashlib
import json
import math
import random
import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from configs.loader import load_run_config
from tests.harness import rows, run_trainings
from trainer.data.config import DataConfig
from trainer.data.prepare import is_heldout, prepare
from trainer.data.sources import Document, read_documents

FOLDER = Path("runs/reweighting")
SEQUENCE = 32
STEPS = {16: 400, 128: 100}
STRATEGIES = {
    "uniform": ["strategy=uniform"],
    "LinUpper, r = 1": ["strategy=linupper", "temperature.value=1.0"],
    "LinUpper, r = 0.4": ["strategy=linupper", "temperature.value=0.4"],
    "Quadratic, r = 1": ["strategy=quadratic", "temperature.value=1.0"],
    "Extremes, r = 1": ["strategy=extremes", "temperature.value=1.0"],
}
CORRUPTED_SHARE, REDUNDANT_SHARE, REPEATED_DOCUMENTS = 0.1, 0.5, 20
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided quantiles of Student's t, by number of pairs


@dataclass(frozen=True)
class Setting:
    """One column block of the tables: what all strategies of a comparison share."""

    corpus: str
    batch: int
    warmup: bool

    @property
    def title(self) -> str:
        return f"{self.corpus}, batch {self.batch}, {'warm-up' if self.warmup else 'no warm-up'}"


SETTINGS = [
    Setting("clean", 128, True), Setting("clean", 16, True), Setting("redundant", 128, True),
    Setting("corrupted", 128, True), Setting("redundant", 16, True), Setting("corrupted", 16, True),
    Setting("clean", 128, False), Setting("clean", 16, False),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--source", default="local_python", help="text, as data.source of a config")
    parser.add_argument("--table", action="store_true", help="train nothing: show what is there")
    arguments = parser.parse_args()
    if not arguments.table:
        corpora = prepare_corpora(arguments.source)
        for seed in range(1, arguments.seeds + 1):
            for setting in SETTINGS:
                train(setting, seed, corpora[setting.corpus])
    FOLDER.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(table for setting in SETTINGS if (table := table_of(setting, arguments.seeds)))
    (FOLDER / "tables.md").write_text(text + "\n")
    sys.stdout.write(text + "\n")


def prepare_corpora(source: str) -> dict[str, list[str]]:
    """Prepare the three corpora; the overrides that select each."""
    clean = DataConfig(source=source, path=str(FOLDER / "data-clean"), vocab_size=1024, heldout_fraction=0.04)
    manifest, _ = prepare(clean)
    natural = {name: counts["train"]["tokens"] for name, counts in manifest["domains"].items()}
    found = {"clean": _overrides(clean, {})}
    for name, domain, share, change in (
        ("corrupted", "corrupted", CORRUPTED_SHARE, _corrupt),
        ("redundant", "repeated", REDUNDANT_SHARE, _set_aside),
    ):
        path = FOLDER / f"{name}.jsonl"
        if not path.exists():
            changed = change(document for document in read_documents(clean))
            path.write_text("".join(json.dumps({"text": d.text, "domain": d.domain}) + "\n" for d in changed))
        config = DataConfig(
            source=str(path), path=str(FOLDER / f"data-{name}"), heldout_fraction=0.04,
            tokenizer=f"{clean.path}/tokenizer.json",
        )  # fmt: skip
        prepare(config)
        total = sum(natural.values())
        weights = {d: round((1 - share) * tokens / total, 6) for d, tokens in natural.items()} | {domain: share}
        found[name] = _overrides(config, weights)
    return found


def _overrides(config: DataConfig, weights: dict[str, float]) -> list[str]:
    fields = ("path", "source", "vocab_size", "heldout_fraction", "tokenizer")
    weighted = [f"data.weights.{domain}={weight}" for domain, weight in weights.items()]
    return [f"data.{field}={getattr(config, field)}" for field in fields] + weighted


def _corrupt(documents: Iterable[Document]) -> Iterator[Document]:
    """One training document in ten as a shuffle of its bytes, in a domain of its own."""
    for document in documents:
        if is_heldout(document.text, 0.04) or _hash(document.text) >= CORRUPTED_SHARE:
            yield document
            continue
        shuffled = list(document.text.encode())
        generator = random.Random(_hash(document.text))
        while True:
            generator.shuffle(shuffled)
            text = bytes(shuffled).decode("latin-1")
            if not is_heldout(text, 0.04):
                break
        yield Document(text, "corrupted")


def _set_aside(documents: Iterable[Document]) -> Iterator[Document]:
    """Twenty training documents of ordinary length in a domain of their own, from which half of the samples come."""
    documents = list(documents)
    ordinary = [d for d in documents if 2000 <= len(d.text) <= 6000 and not is_heldout(d.text, 0.04)]
    chosen = {d.text for d in sorted(ordinary, key=lambda d: _hash(d.text))[:REPEATED_DOCUMENTS]}
    for document in documents:
        yield Document(document.text, "repeated") if document.text in chosen else document


def _hash(text: str) -> float:
    return int.from_bytes(hashlib.sha256(b"study" + text.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64


def run_dir(setting: Setting, strategy: str, seed: int) -> Path:
    if strategy == "uniform":  # a temperature changes nothing there
        setting = replace(setting, warmup=True)
    slug = "".join(c if c.isalnum() or c == "." else "-" for c in f"{setting.title}--{strategy}--{seed}")
    return FOLDER / slug


def train(setting: Setting, seed: int, corpus: list[str]) -> None:
    """Train every strategy of one setting and seed that is not there yet."""
    steps = STEPS[setting.batch]
    plan = []
    for strategy, options in STRATEGIES.items():
        folder = run_dir(setting, strategy, seed)
        if (folder / "checkpoints" / f"step-{steps:08d}").exists():
            continue
        plan.append(
            (
                Path("configs/quickstart.yaml"),
                [
                    *corpus, f"run_dir={folder}", f"seed={seed}", f"train.steps={steps}",
                    f"train.global_batch_size={setting.batch}", "train.micro_batch_size=16", "train.write_every=20",
                    f"train.sequence_length={SEQUENCE}", "model.hidden_size=64", "model.num_layers=3",
                    "model.dense_intermediate_size=192", "model.num_experts=8", "model.expert_intermediate_size=64",
                    "engine.zero_stage=0", f"schedule.warmup_steps={steps // 10}", "evaluation.every=0",
                    "evaluation.max_rows=128", "checkpoint.every=0", "wandb.mode=disabled",
                    f"hooks.sample_reweight.temperature.warmup_steps={steps // 4 if setting.warmup else 0}",
                    *[f"hooks.sample_reweight.{option}" for option in options],
                ],
            )
        )  # fmt: skip
    for _, overrides in plan:
        load_run_config("configs/quickstart.yaml", overrides)  # a mistake shows before an hour is spent
    if plan:
        run_trainings(plan, ranks=1, timeout=3600)


def heldout(setting: Setting, strategy: str, seed: int) -> dict[str, float] | None:
    """Held-out loss by domain (key `all` for all tokens) at the end of a run, or None if it has not been trained."""
    folder = run_dir(setting, strategy, seed)
    if not (folder / "checkpoints" / f"step-{STEPS[setting.batch]:08d}").exists():
        return None
    last = [row for row in rows(folder) if "eval/loss" in row][-1]
    losses = {"all": float(last["eval/loss"])}  # type: ignore[arg-type]
    for key, value in last.items():
        if key.endswith("/ppl") and key != "eval/ppl":
            losses[key.removeprefix("eval/").removesuffix("/ppl")] = math.log(float(value))  # type: ignore[arg-type]
    return losses


def table_of(setting: Setting, seeds: int) -> str:
    """Held-out loss of uniform weights, and each strategy's paired difference to it with a 95 % interval."""
    found = {
        (strategy, seed): heldout(setting, strategy, seed) for strategy in STRATEGIES for seed in range(1, seeds + 1)
    }
    complete = [s for s in range(1, seeds + 1) if all(found[strategy, s] is not None for strategy in STRATEGIES)]
    if not complete:
        return ""
    first = found["uniform", complete[0]]
    assert first is not None
    domains = list(first)
    lines = [f"| {setting.title} ({len(complete)} seeds) | {' | '.join(domains)} |", "|---" * (len(domains) + 1) + "|"]
    for strategy in STRATEGIES:
        cells = []
        for domain in domains:
            values = [found[strategy, s][domain] for s in complete]  # type: ignore[index]
            base = [found["uniform", s][domain] for s in complete]  # type: ignore[index]
            if strategy == "uniform":
                cells.append(f"{statistics.mean(base):.3f}")
            else:
                cells.append(interval([v - b for v, b in zip(values, base, strict=True)]))
        lines.append(f"| {strategy} | {' | '.join(cells)} |")
    return "\n".join(lines)


def interval(differences: list[float]) -> str:
    """Mean and half-width of the 95 % confidence interval of paired differences."""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return f"{mean:+.3f}"
    half = T_95[len(differences)] * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{mean:+.3f} ± {half:.3f}"


if __name__ == "__main__":
    main()
