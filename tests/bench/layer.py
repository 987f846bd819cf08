"""`moe_layer` and `moe_vs_dense`: one MoE layer, forward and backward, against its limit, a dense layer and its peers.

The limit is the plain matrix products of the same FLOPs. Every peer has the weights of our layer and routes alike, and
its output and all its gradients are compared with ours before anything is timed.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from moe.blocks import MoELayer
from moe.config import ModelConfig
from moe.layers import FeedForward
from tests.bench.peers import PEERS, Peer, Weights
from tests.bench.report import Report
from tests.bench.timing import Timing, interleaved

HIDDEN = 512
WORKLOADS = {
    "A": ModelConfig(num_experts=16, top_k=2, expert_intermediate_size=1024, hidden_size=HIDDEN, num_shared_experts=0),
    "B": ModelConfig(num_experts=64, top_k=6, expert_intermediate_size=256, hidden_size=HIDDEN, num_shared_experts=0),
}


class Workload:
    """Our layer of one workload, its input and cotangent."""

    def __init__(self, config: ModelConfig, tokens: int = 4096) -> None:
        torch.manual_seed(0)
        self.config = replace(config, router_score="softmax")
        self.layer = MoELayer(self.config, parallel_size=1)
        for parameter in self.layer.parameters():
            nn.init.normal_(parameter, std=0.05)
        # DeepSeek-V3 scores by a sigmoid: the same experts for the same weights, but other gates.
        self.sigmoid = MoELayer(replace(config, router_score="sigmoid"), parallel_size=1)
        self.sigmoid.load_state_dict(self.layer.state_dict())
        self.x_BTD = torch.randn(1, tokens, HIDDEN, requires_grad=True)
        self.cotangent_BTD = torch.randn(1, tokens, HIDDEN)
        self._counted_BT = torch.ones(1, tokens, dtype=torch.bool)

    @property
    def weights(self) -> Weights:
        return Weights(self.layer.router.weight, self.layer.experts.gate_up, self.layer.experts.down)

    def run(self, module: nn.Module) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Output, gradients of the module's parameters and of the input."""
        output = module(self.x_BTD, self._counted_BT)[0] if isinstance(module, MoELayer) else module(self.x_BTD)
        names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        wanted = [module.get_parameter(name) for name in names]
        dx, *gradients = torch.autograd.grad(output, [self.x_BTD, *wanted], self.cotangent_BTD)
        return output, dict(zip(names, gradients, strict=True)), dx

    def in_bf16(self) -> "Workload":
        """The same in bf16, for peers that compute so."""
        other = Workload(self.config, self.x_BTD.shape[1])
        other.layer.bfloat16()
        other.x_BTD = self.x_BTD.detach().bfloat16().requires_grad_()
        other.cotangent_BTD = self.cotangent_BTD.bfloat16()
        return other

    def check(self, peer: Peer) -> None:
        """The peer computes the same function with the same gradients, or AssertionError."""
        y, gradients, dx = self.run(peer.module)
        found = [y, dx, *peer.gradients(gradients)]
        expected = self._sigmoid_results if peer.sigmoid else self._results
        tolerance = 2e-2 if peer.bf16 else 1e-4
        for what, mine, theirs in zip(("output", "x", "router", "gate_up", "down"), expected, found, strict=True):
            error = ((mine - theirs).norm() / mine.norm()).item()
            if not error < tolerance:
                raise AssertionError(f"{what} differs by {error:.1e}")

    @cached_property
    def _results(self) -> list[Tensor]:
        return self._own_results(self.layer)

    @cached_property
    def _sigmoid_results(self) -> list[Tensor]:
        return self._own_results(self.sigmoid)

    def _own_results(self, layer: MoELayer) -> list[Tensor]:
        y, gradients, dx = self.run(layer)
        return [y, dx, *(gradients[name] for name in ("router.weight", "experts.gate_up", "experts.down"))]

    def limit(self) -> Callable[[], None]:
        """The six products of a SwiGLU feed-forward of the same FLOPs: two forward, four backward."""
        tokens, inner = self.x_BTD.shape[1], self.config.top_k * self.config.expert_intermediate_size
        a, b, c, d = (torch.randn(s) for s in [(tokens, HIDDEN), (HIDDEN, 2 * inner), (tokens, inner), (inner, HIDDEN)])
        up, down = a @ b, c @ d

        def products() -> None:
            torch.mm(a, b)
            torch.mm(c, d)
            torch.mm(up, b.T)
            torch.mm(a.T, up)
            torch.mm(down, d.T)
            torch.mm(c.T, down)

        return products


def measure(report: Report, rounds: int = 5) -> None:
    """Time both workloads."""
    for name, config in WORKLOADS.items():
        workload = Workload(config)
        dense = FeedForward(HIDDEN, config.top_k * config.expert_intermediate_size)
        peers = _available_peers(workload, name, report)
        tasks: dict[str, Callable[[], object]] = {
            "limit": workload.limit(),
            "ours": lambda w=workload: w.run(w.layer),
            "dense": lambda w=workload, d=dense: w.run(d),
        }
        # bf16 takes half the time of fp32 on some processors and several times as long on others: few tokens, and ours
        # in bf16 beside it.
        few = Workload(config, 512)
        few_bf16 = few.in_bf16()
        ratios: dict[str, tuple[float, float]] = {}
        for peer in (peer for peer in peers if peer.bf16):
            pair = {"ours": lambda w=few_bf16: w.run(w.layer), peer.name: lambda w=few, p=peer: w.run(p.module)}
            timed_pair = interleaved(pair, rounds=rounds)
            ratios[peer.name] = _ratio(timed_pair[peer.name], timed_pair["ours"])
        others = {peer.name: (lambda w=workload, p=peer: w.run(p.module)) for peer in peers if not peer.bf16}
        timed = interleaved(tasks | others, rounds=rounds, warm_up=0)  # the comparison has warmed up most of them
        ratios |= {peer: _ratio(timed[peer], timed["ours"]) for peer in others}
        _report(report, name, timed, ratios)
    worst = min(WORKLOADS, key=lambda name: report.rows[f"moe_layer/{name}/dense_over_ours"].median)
    row = report.rows[f"moe_layer/{worst}/dense_over_ours"]
    report.add("moe_vs_dense/dense_over_ours", row.median, row.minimum, note=f"workload {worst}")


def _available_peers(workload: Workload, name: str, report: Report) -> list[Peer]:
    few = Workload(workload.config, 512)
    found = []
    for peer_name, build in PEERS.items():
        try:
            peer = build(workload.config, workload.weights)
            (few if peer.bf16 else workload).check(peer)
        except Exception as error:  # a peer that cannot run, or computes something else, is listed with the reason
            report.not_run(f"moe_layer/{name}/peer/{peer_name}", error)
        else:
            found.append(peer)
        sys.stderr.write(f"moe_layer {name}: {peer_name} checked\n")
    return found


def _ratio(of: Timing, to: Timing) -> tuple[float, float]:
    return of.median / to.median, of.minimum / to.minimum


def _report(report: Report, name: str, timed: dict[str, Timing], peers: dict[str, tuple[float, float]]) -> None:
    report.add(f"moe_layer/{name}/limit_over_ours", *_ratio(timed["limit"], timed["ours"]))
    report.add(f"moe_layer/{name}/dense_over_ours", *_ratio(timed["dense"], timed["ours"]))
    report.add(f"moe_layer/{name}/limit_over_dense", *_ratio(timed["limit"], timed["dense"]))
    for peer, ratios in peers.items():
        report.add(f"moe_layer/{name}/peer/{peer}", *ratios)
    if peers:
        best = min(peers, key=lambda peer: peers[peer][0])
        report.add(f"moe_layer/{name}/best_peer_over_ours", *peers[best], note=best)
