"""`make bench`: ratios of this machine, all from one run. Prints a table and writes runs/bench.json.

Everything is timed by CPU time on one thread, in interleaved rounds, and the median is taken: on shared cores wall time
says little. A layer's limit is the plain matrix products of the same FLOPs. Nothing is timed before its output has been
compared.
"""

import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from moe.bias_hook import ExpertBiasConfig, ExpertBiasHook
from moe.config import ModelConfig
from moe.layers import FeedForward
from moe.model import MoEDecoder, MoELayer
from reweighting.strategies import STRATEGIES
from reweighting.weighing import sample_weights
from tests.moe.test_bias_hook import APPLIED, Records, run_of, step_of
from tests.moe.test_model import naive_experts

TOKENS, HIDDEN = 4096, 512
LAYERS = {"A": (16, 2, 1024), "B": (64, 6, 256)}  # experts, top-k, width of an expert
ROUNDS = 5


def interleaved(tasks: dict[str, Callable[[], None]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median CPU seconds of each task, after one round that does not count."""
    spent: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds + 1):
        for name, task in tasks.items():
            begin = time.process_time()
            task()
            if number:
                spent[name].append(time.process_time() - begin)
    return {name: statistics.median(values) for name, values in spent.items()}


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed instead of returning it to the kernel; True if it took the setting.

    By default every tensor of some MB is mapped and zeroed anew each time, at about a microsecond a page: a tax that
    grows with the temporaries of an implementation and says nothing of its arithmetic. Without it the peers, which
    make more of them, stand in their best light too. Settings are M_MMAP_MAX = 0 and M_TRIM_THRESHOLD = the maximum.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(key, value) == 1 for key, value in ((-4, 0), (-1, 2**31 - 1)))


def layer_ratios(name: str) -> dict[str, float]:
    """Limit / ours, equal-FLOP dense / ours and peers / ours, forward and backward, fp32, in a tuned allocator."""
    keep_freed_memory()
    experts, top_k, width = LAYERS[name]
    torch.manual_seed(0)
    config = ModelConfig(
        hidden_size=HIDDEN, num_experts=experts, top_k=top_k, expert_intermediate_size=width, num_heads=8
    )
    layer, dense = MoELayer(_without_shared(config), parallel_size=1), FeedForward(HIDDEN, top_k * width)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    x_BTD = torch.randn(1, TOKENS, HIDDEN, requires_grad=True)
    counted_BT = torch.ones(1, TOKENS, dtype=torch.bool)
    cotangent = torch.randn(1, TOKENS, HIDDEN)

    few = x_BTD[:, :64].detach()
    indices_NK, gates_NK, *_ = layer.router(few[0], counted_BT[0, :64])
    expected = naive_experts(few[0], indices_NK, gates_NK, layer.experts.gate_up, layer.experts.down)
    torch.testing.assert_close(layer(few, counted_BT[:, :64])[0][0], expected, rtol=1e-3, atol=1e-3)

    a, b = torch.randn(TOKENS, HIDDEN), torch.randn(HIDDEN, 2 * top_k * width)
    c, d = torch.randn(TOKENS, top_k * width), torch.randn(top_k * width, HIDDEN)
    up, down = a @ b, c @ d

    def limit() -> None:
        """The six products of a SwiGLU feed-forward of the same FLOPs: two forward, four backward."""
        torch.mm(a, b)
        torch.mm(c, d)
        torch.mm(up, b.T)
        torch.mm(a.T, up)
        torch.mm(down, d.T)
        torch.mm(c.T, down)

    def gradients(output: torch.Tensor, module: torch.nn.Module) -> None:
        torch.autograd.grad(output, [x_BTD, *module.parameters()], cotangent)

    peers = transformers_peers(layer, experts, top_k, width)
    for block in peers.values():
        torch.testing.assert_close(block(x_BTD), layer(x_BTD, counted_BT)[0], rtol=1e-3, atol=1e-2)
    median = interleaved(
        {
            **{name: (lambda block=block: gradients(block(x_BTD), block)) for name, block in peers.items()},
            "limit": limit,
            "ours": lambda: gradients(layer(x_BTD, counted_BT)[0], layer),
            "dense": lambda: gradients(dense(x_BTD), dense),
        }
    )
    ratios = {f"moe_layer/{name}/limit_over_ours": median["limit"] / median["ours"]}
    ratios[f"moe_layer/{name}/dense_over_ours"] = median["dense"] / median["ours"]
    ratios |= {f"moe_layer/{name}/peer/{peer}": median[peer] / median["ours"] for peer in peers}
    ratios[f"moe_layer/{name}/best_peer_over_ours"] = min(median[peer] for peer in peers) / median["ours"]
    return ratios


def transformers_peers(layer: MoELayer, experts: int, top_k: int, width: int) -> dict[str, torch.nn.Module]:
    """transformers' Qwen3-MoE block with the weights of `layer`, for each implementation of its experts."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    class Block(Qwen3MoeSparseMoeBlock):
        def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
            output = super().forward(x_BTD)
            return output[0] if isinstance(output, tuple) else output

    blocks: dict[str, torch.nn.Module] = {}
    for implementation in ("grouped_mm", "eager"):
        config = Qwen3MoeConfig(
            hidden_size=HIDDEN, num_experts=experts, num_experts_per_tok=top_k, moe_intermediate_size=width,
            norm_topk_prob=True, experts_implementation=implementation,
        )  # fmt: skip
        block = Block(config)
        with torch.no_grad():
            block.gate.weight.copy_(layer.router.weight)
            block.experts.gate_up_proj.copy_(layer.experts.gate_up.transpose(1, 2))
            block.experts.down_proj.copy_(layer.experts.down.transpose(1, 2))
        blocks[f"transformers_{implementation}"] = block
    return blocks


def _without_shared(config: ModelConfig) -> ModelConfig:
    import dataclasses

    return dataclasses.replace(config, num_shared_experts=0, router_score="softmax")


def hook_ratios() -> dict[str, float]:
    """Step time with / without each hook's work, in one process, and of the accumulation modes."""
    config = ModelConfig(
        hidden_size=256, num_layers=4, num_dense_layers=1, dense_intermediate_size=704, num_heads=8, num_kv_heads=4,
        num_experts=16, top_k=2, expert_intermediate_size=256, num_shared_experts=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MoEDecoder(config, vocab_size=4096)
    hook = ExpertBiasHook(ExpertBiasConfig())
    hook.on_start(run_of(model))
    batches = [torch.randint(0, 4096, (4, 128)) for _ in range(4)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def losses(tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens, tokens).mean(dim=1)

    def finish() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def plain(move_bias: bool = False) -> None:
        for tokens in batches:
            (losses(tokens).sum() / 16).backward()
        finish()
        if move_bias:
            hook.after_step(step_of(Records()), APPLIED)
        else:
            model.take_counts("train")

    def weights(found: list[torch.Tensor]) -> list[torch.Tensor]:
        all_losses = torch.cat([loss.detach() for loss in found])
        valid = torch.ones(16, dtype=torch.bool)
        return list(sample_weights(all_losses, valid, STRATEGIES["linupper"], alpha=1.0, temperature=1.0).split(4))

    def deferred() -> None:
        graphs = [losses(tokens) for tokens in batches]
        for loss, weight in zip(graphs, weights(graphs), strict=True):
            (loss * weight).sum().backward()
        finish()
        model.take_counts("train")

    def two_pass() -> None:
        with torch.no_grad():
            scored = [losses(tokens) for tokens in batches]
        for tokens, weight in zip(batches, weights(scored), strict=True):
            (losses(tokens) * weight).sum().backward()
        finish()
        model.take_counts("train")

    median = interleaved(
        {"plain": plain, "bias": lambda: plain(move_bias=True), "deferred": deferred, "two_pass": two_pass}
    )
    return {f"hooks/{name}": median[name] / median["plain"] for name in ("bias", "deferred", "two_pass")}


if __name__ == "__main__":
    torch.set_num_threads(1)
    figures = layer_ratios("A") | layer_ratios("B") | hook_ratios()
    table = Table(title=f"ratios on this machine (torch {torch.__version__}, one thread)")
    table.add_column("key")
    table.add_column("ratio", justify="right")
    for key, value in figures.items():
        table.add_row(key, f"{value:.3f}")
    Console(file=sys.stdout).print(table)
    Path("runs").mkdir(exist_ok=True)
    Path("runs/bench.json").write_text(json.dumps(figures, indent=1))
