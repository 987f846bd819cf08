"""`launch.data` on a small corpus: what it shows is what a run trains on."""

import csv
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from launch import data as data_command
from launch._cli import run_command
from tests.harness import tiny_config
from tests.launch.run_folders import links_out
from trainer.data.config import DataConfig
from trainer.data.corpus import TokenCorpus
from trainer.data.prepare import prepare


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, data_config: DataConfig) -> Path:
    data = {"phases": [{"from_share": 0.5, "weights": {"table": 1}}], "weights": {"prose": 1, "table": 3}}
    return tiny_config(tmp_path_factory.mktemp("data"), data_config, data=data)


def output(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert run_command(data_command.main, list(arguments)) == code
    return capsys.readouterr().out


def test_show_prints_the_rows_that_are_trained(
    config: Path, data_config: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = output(capsys, "show", str(config), "--samples", "0,50")
    corpus = TokenCorpus.open(
        dataclasses.replace(data_config, weights={"prose": 1, "table": 3}),
        sequence_length=32,
        seed=3,
        mask_documents=False,
    )
    first = corpus.train_batch(np.array([0]))
    text = corpus.decode(first.tokens_ST[0, 1:].tolist())
    assert (
        text.replace("<|endoftext|>", "").split()[:3]
        == re.sub(r"\[document \d+\]", "", shown).split("»")[2].split()[:3]
    )
    assert "sample 50 · table · row" in shown
    assert "phase 1 · 32 targets of 32" in shown


def test_show_marks_documents_padding_and_what_is_no_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["one two three", "four five six seven", "eight nine"]
    (tmp_path / "numbers.jsonl").write_text(
        "".join(json.dumps({"text": f"{t} {i}"}) + "\n" for i in range(20) for t in texts)
    )
    data = DataConfig(
        path=str(tmp_path / "out"), source=str(tmp_path / "numbers.jsonl"), vocab_size=300, heldout_fraction=0.01
    )
    prepare(data)
    config = tiny_config(tmp_path, data, data={"packing": "best_fit"}, model={"document_mask": True})
    shown = output(capsys, "show", str(config), "--count", "4")
    assert shown.count("sample ") == 4
    assert len(re.findall(r"\[document \d+\] «", shown)) >= 8, "the first token of each document is no target"
    assert "<|endoftext|>" in shown, "the last target of a document is shown with it"
    assert re.search(r"\[padding: \d+ tokens\]", shown)


def test_show_finds_a_domain(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = output(capsys, "show", str(config), "--domain", "prose", "--count", "2")
    assert shown.count("· prose ·") == 2
    assert "· table ·" not in shown


def test_stats_count_the_corpus_and_write_a_page(
    config: Path, tmp_path: Path, data_config: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = output(capsys, "stats", str(config), "--out", str(tmp_path / "new" / "stats.html"))
    manifest = json.loads((Path(data_config.path) / "manifest.json").read_text())
    for counts in manifest["domains"].values():
        assert f"{counts['train']['tokens']:,}" in shown
        assert f"{counts['heldout']['tokens']:,}" in shown
    assert "0.00% padding" in shown
    page = (tmp_path / "new" / "stats.html").read_text()
    assert links_out(page) == [], "everything is in the file"
    for title in ("Domains", "Tokens", "Lengths of documents", "Compression", "Mixture", "Epochs", "Padding"):
        assert f"<h3>{title}</h3>" in page
    assert "step 6: data.phases[0]" in page


def test_audit_of_a_plan_counts_rows_and_documents(
    config: Path, tmp_path: Path, data_config: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = output(capsys, "audit", str(config), "--samples", "20000", "--out", str(tmp_path / "csv"))
    assert "exactly as planned" in shown
    visits: dict[str, list[int]] = {}
    with (tmp_path / "csv" / "rows.csv").open() as file:
        for row in csv.DictReader(file):
            visits.setdefault(row["domain"], []).append(int(row["visits"]))
    assert sum(map(sum, visits.values())) == 20000
    assert all(max(each) - min(each) <= 1 for each in visits.values())
    assert min(visits["table"]) >= 12, "epochs of a small domain"
    with (tmp_path / "csv" / "documents.csv").open() as file:
        documents = list(csv.DictReader(file))
    manifest = json.loads((Path(data_config.path) / "manifest.json").read_text())
    for domain, counts in manifest["domains"].items():
        own = [row for row in documents if row["domain"] == domain]
        assert len(own) == counts["train"]["documents"]
        assert sum(int(row["tokens"]) for row in own) == counts["train"]["tokens"]
        assert {int(row["most_visits"]) for row in own} <= set(visits[domain])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "CONFIG", "--samples", "1,x"], "'1,x' is not a list of numbers"),
        (["show", "CONFIG", "--domain", "prosa"], "prosa is no domain of the corpus; it has code, prose, table"),
        (["show", "CONFIG", "--samples", "50", "--domain", "prose"], "none of --samples is of this domain"),
        (["show", "CONFIG", "--domain", "code"], "the run has no sample of code ahead"),
        (["show", "CONFIG", "--count", "0"], "--count: 0 must be at least 1"),
        (["audit", "CONFIG", "--samples", "0"], "--samples: 0 must be at least 1"),
        (["audit", "CONFIG", "data.max_epochs={table: 0.01}"], "wants 96 samples, the caps allow"),
        (["stats", "no_such.yaml"], "no such config file"),
        (["stats", "FOLDER"], "config.yaml: no such config file"),
        (["stats", "FOLDER", "train.steps=3"], "a run folder has its own configuration"),
        (["stats", "CONFIG", "train.stps=3"], "train.stps: Key 'stps' not in"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(
    arguments: list[str], message: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"CONFIG": str(config), "FOLDER": str(tmp_path)}
    assert run_command(data_command.main, [names.get(each, each) for each in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
