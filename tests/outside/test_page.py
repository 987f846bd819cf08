"""The blocks of moe/OTHER_LOOPS.md and of the README's section run as printed, and the bare loop is exact."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("accelerate")

from transformers import TrainingArguments

from moe.foreign_routers import find_routers
from tests.harness import ROOT
from tests.outside.conftest import TwoRanks, block, run_job
from tests.outside.families import experts_of, tiny_model


def check_bare(printed: list[str]) -> None:
    rows = [line.split() for line in printed if re.match(r"\d+ \d", line)]
    losses, violations = plain_losses()
    assert [float(row[1]) for row in rows] == pytest.approx(losses, rel=1e-5)
    assert [float(row[2]) for row in rows] == pytest.approx(violations, abs=1e-4)


def plain_losses() -> tuple[list[float], list[float]]:
    """Weighted loss and MaxVio of each step of bare.py, with its model and data in a loop of one process without us."""
    namespace: dict[str, Any] = {}
    exec(block("bare.py").split("# --- from here on")[0], namespace)
    model, data = namespace["model"].train(), namespace["data"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    chosen: dict[str, Tensor] = {}
    for name, experts in experts_of(model).items():
        experts.register_forward_pre_hook(lambda module, args, name=name: chosen.update({name: args[1]}))
    gates = [layer.mlp.gate for layer in model.model.layers]
    losses, violations = [], []
    for ids_BT in data:
        logits_BTV = model(input_ids=ids_BT).logits
        losses_B = torch.stack(
            [F.cross_entropy(l_TV[:-1], ids_T[1:]) for l_TV, ids_T in zip(logits_BTV, ids_BT, strict=True)]
        )
        low, high = losses_B.detach().aminmax()
        h_B = (2 * losses_B.detach() - low - high) / (high - low)
        loss = (((h_B + 1).clamp(max=1) / 0.3).softmax(dim=0) * losses_B).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        counts = [chosen_NK.flatten().bincount(minlength=8).double() for chosen_NK in chosen.values()]
        for gate, counts_E in zip(gates, counts, strict=True):
            gate.e_score_correction_bias += 0.01 * (counts_E.mean() - counts_E).sign()
        losses.append(float(loss.detach()))
        violations.append(sum(float(c_E.max() / c_E.mean()) - 1 for c_E in counts) / len(counts))
    return losses, violations


def test_the_bare_loop_equals_a_plain_one(two_ranks: TwoRanks) -> None:
    assert block("bare.py").split("# --- from here on")[1].count("\n") <= 45
    check_bare(two_ranks.printed)


@pytest.mark.slow
def test_the_bare_loop_on_one_rank(tmp_path: Path) -> None:
    (tmp_path / "bare.py").write_text(block("bare.py"))
    check_bare(run_job(json.dumps([str(tmp_path / "bare.py")]), ranks=1).stdout.splitlines())


def test_the_trainer_block_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(block("pretrain.py"), {})
    text = capsys.readouterr().out
    assert "moe/maxvio" in text
    assert "reweight/ess" in text
    assert "loss/unweighted" in text


def test_routers_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    exec(block("own.py"), {})
    violations = [float(line) for line in capsys.readouterr().out.splitlines()]
    assert violations[-1] < 0.3 * violations[0]


def test_the_blocks_of_the_readme_run(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    section = readme[readme.index("## In your own loop") : readme.index("## Write a hook")]
    in_any_loop, under_the_trainer = re.findall(r"```python\n(.*?)```", section, re.DOTALL)

    model = tiny_model("deepseek_v3").train()
    batches = [torch.randint(3, 60, (2, 16)) for _ in range(3)]
    exec(in_any_loop, {"model": model, "batches": batches, "train_step": lambda ids_BT: model(input_ids=ids_BT)})
    assert all(router.bias_E.any() for router in find_routers(model))

    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=2, report_to=[],
        use_cpu=True, save_strategy="no",
    )  # fmt: skip
    model = tiny_model("minimax_m2")
    rows = [{"input_ids": ids_T, "labels": ids_T} for ids_T in torch.randint(3, 60, (4, 16))]
    exec(under_the_trainer, {"model": model, "args": args, "rows": rows})
    assert all(router.bias_E.any() for router in find_routers(model))
