"""lm-evaluation-harness scores an exported model as the model itself does. Needs `make lm-eval`."""

import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from tokenizers import Tokenizer

from launch._trained import load_trained_model
from moe.model import MoEDecoder
from tests.harness import ROOT, environment, run, tiny_config
from trainer.data.config import DataConfig

PYTHON = ROOT / ".venv-bench" / "bin" / "python"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not list(PYTHON.parents[1].glob("lib/python*/site-packages/lm_eval")),
        reason="lm_eval is not in .venv-bench: make lm-eval",
    ),
]


def write_tasks(folder: Path) -> None:
    """Two tasks from nothing but arithmetic: which row continues a table, and how likely the table is."""
    folder.mkdir()

    def line(number: int) -> str:
        return f"{number} {number * number} {number % 7} {number % 11}"

    choices, texts = [], []
    for start in range(4010, 4210, 5):
        rows = "\n".join(line(number) for number in range(start, start + 2)) + "\n"
        right = line(start + 2)
        wrong = " ".join(reversed(right.split()))
        options = [right, wrong] if start % 2 else [wrong, right]
        choices.append({"context": rows, "choices": options, "answer": options.index(right)})
        texts.append({"text": rows})
    for name, documents in (("choices", choices), ("texts", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))

    def task(name: str, data: str, **rest: object) -> None:
        shared = {
            "task": name, "dataset_path": "json", "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{data}.jsonl")}}, "metadata": {"version": 1},
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(shared | rest))

    task(
        "table_choice", "choices", output_type="multiple_choice", doc_to_text="{{context}}",
        doc_to_choice="{{choices}}", doc_to_target="{{answer}}", target_delimiter="",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip
    task(
        "table_text", "texts", output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
    )  # fmt: skip


def log_likelihood(model: MoEDecoder, context: list[int], continuation: list[int]) -> float:
    tokens_BT = torch.tensor([context + continuation])
    with torch.no_grad():
        losses_T = F.cross_entropy(model(tokens_BT[:, :-1])[0], tokens_BT[0, 1:], reduction="none")
    return -float(losses_T[len(context) - 1 :].sum())


def test_the_harness_and_the_model_agree(tmp_path: Path, data_config: DataConfig) -> None:
    config = tiny_config(
        tmp_path, data_config, train={"steps": 200, "sequence_length": 128}, checkpoint={"every": 0},
        evaluation={"every": 0}, schedule={"warmup_steps": 8},
    )  # fmt: skip
    assert run("launch.train", str(config)).returncode == 0
    out = tmp_path / "exported"
    exported = run("launch.export", str(tmp_path / "run"), "--out", str(out))
    assert exported.returncode == 0, exported.stderr
    write_tasks(tmp_path / "tasks")

    offline = environment(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    done = subprocess.run(
        [
            str(PYTHON), "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={out},dtype=float32",
            "--tasks", "table_choice", "table_text", "--include_path", str(tmp_path / "tasks"), "--device", "cpu",
            "--batch_size", "4", "--output_path", str(tmp_path / "results"),
        ],
        env=offline, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(next((tmp_path / "results").rglob("results*.json")).read_text())["results"]

    _, _, model, _ = load_trained_model(tmp_path / "run", torch.device("cpu"))
    model.eval()
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")

    bits = num_bytes = guess = 0.0
    for document in map(json.loads, (tmp_path / "tasks" / "texts.jsonl").read_text().splitlines()):
        tokens = tokenizer.encode(document["text"]).ids
        bits -= log_likelihood(model, [end], tokens) / math.log(2)
        guess += len(tokens) * math.log2(tokenizer.get_vocab_size())
        num_bytes += len(document["text"].encode())
    assert results["table_text"]["bits_per_byte,none"] == pytest.approx(bits / num_bytes, rel=1e-5)
    assert bits < 0.8 * guess, "the model has learned something"

    right = 0
    documents = list(map(json.loads, (tmp_path / "tasks" / "choices.jsonl").read_text().splitlines()))
    for document in documents:
        context = tokenizer.encode(document["context"]).ids
        scores = []
        for choice in document["choices"]:
            whole = tokenizer.encode(document["context"] + choice).ids
            scores.append(log_likelihood(model, context, whole[len(context) :]))
        right += scores.index(max(scores)) == document["answer"]
    assert 0 < right < len(documents), "a figure that could have been another"
    print(f"bits per byte {bits / num_bytes:.4f}, accuracy {right / len(documents):.3f}")
    assert results["table_choice"]["acc,none"] == pytest.approx(right / len(documents))
