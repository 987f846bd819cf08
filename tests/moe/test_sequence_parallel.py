"""Rows spread over ranks give the losses, features, loads and gradients of whole rows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import ROOT, environment

SCRIPT = '''
import dataclasses, sys, torch, torch.distributed as dist
from moe.config import AuxLossConfig, ModelConfig
from moe.latent import LatentConfig
from moe.model import MoEDecoder

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
SMALL = ModelConfig(
    hidden_size=32, num_layers=3, num_dense_layers=1, dense_intermediate_size=48, num_heads=4, num_kv_heads=2,
    num_experts=8, top_k=2, expert_intermediate_size=16, num_shared_experts=1, init_std=0.1,
)
LOSSES = AuxLossConfig(switch=0.1, sequence=0.2, global_batch=0.3, z=0.01)
CASES = {
    "grouped queries": SMALL,
    "one key-value head": dataclasses.replace(SMALL, num_kv_heads=1),
    "query norms, part of the head turned": dataclasses.replace(SMALL, qk_norm=True, partial_rotary=0.5),
    "latents": dataclasses.replace(
        SMALL, attention="mla", num_kv_heads=4,
        mla=LatentConfig(q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6),
    ),
    "documents": dataclasses.replace(SMALL, document_mask=True),
    "all losses": dataclasses.replace(SMALL, aux_loss=LOSSES),
    "all losses, recomputed": dataclasses.replace(SMALL, aux_loss=LOSSES, activation_recompute="block"),
    "two tokens ahead, documents": dataclasses.replace(SMALL, mtp_weight=0.3, document_mask=True, aux_loss=LOSSES),
}
torch.manual_seed(1)
B, T, V = 3, 16, 40
tokens = torch.randint(0, V, (B, T))
labels = torch.roll(tokens, -1, 1)
labels[0, 11:] = -100
labels[2] = -100
documents = torch.tensor([[0] * 7 + [1] * 4 + [-1] * 5, [2] * 9 + [3] * 7, [4] * 16])
weights = torch.rand(B)


def run(model):
    """Losses, features, loads and gradients of one forward and backward."""
    output = model(tokens, labels, documents)
    losses, features, statistics = output if isinstance(output, tuple) else (output, torch.zeros(B, 1), torch.zeros(1))
    coefficients = torch.linspace(0.5, 1.5, features.shape[1])
    objective = (losses.sum(1) * weights).sum() + (features @ coefficients).sum()
    objective.backward()
    loads = model.take_loads("train")
    counts = [each.counts_E for each in loads] + [each.by_sample_SE for each in loads]
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return losses.detach(), features.detach(), statistics, counts, gradients


groups = {size: [dist.new_group(list(range(i, i + size))) for i in range(0, world, size)] for size in (2, 4)}
for name, config in CASES.items():
    torch.manual_seed(0)
    plain = MoEDecoder(config, vocab_size=V)
    plain.count_by_sample(2)
    expected = run(plain)
    for size, members in groups.items():
        torch.manual_seed(0)
        model = MoEDecoder(config, vocab_size=V)
        model.count_by_sample(2)
        group = members[rank // size]
        model.join_sequence_group(group)
        losses, features, statistics, counts, gradients = run(model)
        torch.testing.assert_close(losses, expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(features, expected[1], rtol=1e-5, atol=1e-6)
        for own, whole in zip([statistics, *counts], [expected[2], *expected[3]], strict=True):
            dist.all_reduce(own, group=group)
            assert torch.equal(own, whole), (name, size)
        for key, own in gradients.items():
            dist.all_reduce(own, group=group)
            error = (own - expected[4][key]).norm() / expected[4][key].norm().clamp(min=1e-6)
            assert error <= 2e-6, (name, size, key, error)
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(model(tokens, labels, documents), plain.eval()(tokens, labels, documents))
        plain.train()
    if rank == 0:
        print("equal:", name)
'''


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    script = tmp_path_factory.mktemp("sequence") / "script.py"
    Path(script).write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4", str(script)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(PATH=os.environ["PATH"]), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "case",
    [
        "grouped queries", "one key-value head", "query norms, part of the head turned", "latents", "documents",
        "all losses", "all losses, recomputed", "two tokens ahead, documents",
    ],
)  # fmt: skip
def test_shares_of_two_and_four_ranks_make_the_whole(case: str, output: str) -> None:
    assert f"equal: {case}\n" in output
