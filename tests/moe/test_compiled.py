"""Compiled regions: the same training within rounding, really compiled, once for all blocks and shapes."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from configs.loader import load_run_config
from launch import profile
from launch._cli import run_command
from moe.config import ModelConfig
from moe.model import MoEDecoder
from tests.moe.test_model import SMALL, VOCAB
from trainer.errors import ConfigError


def steps(config: ModelConfig, sizes: list[tuple[int, int]], *, threshold: float = 0.0) -> list[Tensor]:
    """Losses of AdamW steps on rows of these sizes, and the last gradients."""
    torch.manual_seed(0)
    model = MoEDecoder(config, vocab_size=VOCAB)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)
    generator = torch.Generator().manual_seed(2)
    seen = []
    for rows, length in sizes:
        tokens_BT = torch.randint(0, VOCAB, (rows, length + 1), generator=generator)
        optimizer.zero_grad()
        losses_BT = model(tokens_BT[:, :-1], tokens_BT[:, 1:].clone())
        assert isinstance(losses_BT, Tensor)
        losses_BT.mean().backward()
        optimizer.step()
        seen.append(losses_BT.detach().mean())
    return [*seen, *(p.grad for p in model.parameters() if p.grad is not None)]


def test_a_training_has_the_same_losses_and_compiles_once() -> None:
    """Experts in turn: what a tie broken the other way would do says nothing about compiling (moe/loss_head.py)."""
    config = dataclasses.replace(SMALL, uniform_routing=True, qk_norm=True, num_layers=12)
    sizes = [(3, 16), (2, 24), (4, 9), (3, 16)] * 3
    plain = steps(config, sizes)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    compiled = steps(dataclasses.replace(config, compile=True), sizes)
    for ours, theirs in zip(compiled[: len(sizes)], plain, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    for ours, theirs in zip(compiled[len(sizes) :], plain[len(sizes) :], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    # Attention with its norms, the dense feed-forward and the shared experts: one version each for twelve blocks.
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]
    # Recomputed blocks run the same code: the same bits.
    recomputed = steps(dataclasses.replace(config, compile=True, activation_recompute="block"), sizes)
    assert all(torch.equal(a, b) for a, b in zip(recomputed, compiled, strict=True))
    assert counters["stats"]["unique_graphs"] == 3


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["engine.zero_stage=3"], "engine.zero_stage 3, which takes parameters out of the regions"),
        (["engine.sequence_parallel_size=2"], "engine.sequence_parallel_size (2), whose exchanges lie inside"),
        (["profile.breakdown=true"], "profile.breakdown, which would have to look inside"),
        (["model.activation_recompute=selective"], "model.activation_recompute: selective remakes insides"),
    ],
)
def test_what_it_cannot_go_with_is_refused(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=line.replace("(", r"\(").replace(")", r"\)")):
        load_run_config("configs/debug.yaml", ["model.compile=true", *overrides], world_size=2)


def test_a_profile_by_parts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["configs/debug.yaml", "model.compile=true", f"run_dir={tmp_path}"]
    assert run_command(profile.main, arguments) == 2
    assert "model.compile: its regions cannot be divided into parts" in capsys.readouterr().err


def test_without_a_compiler_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config as inductor

    torch._dynamo.reset()
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(inductor, "fx_graph_cache", False)
    with pytest.raises(ConfigError, match=r"model\.compile: torch\.compile cannot do it here .*set it to false"):
        steps(dataclasses.replace(SMALL, compile=True), [(2, 8)])
    torch._dynamo.reset()
