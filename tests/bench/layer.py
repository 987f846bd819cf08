"""`moe_layer` and `moe_vs_dense`: one MoE layer, forward and backward, against its limit, a dense layer and its peers.

The limit is the plain matrix products of the same FLOPs. Every peer has the weights of our layer and routes alike, and
its output and all its gradients are compared with ours before anything is timed.
"""

import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from moe.blocks import MoELayer
from moe.config import ModelConfig
from moe.layers import FeedForward
from tests.bench.peers import PEERS, Builder, Peer, Weights
from tests.bench.report import Report
from tests.bench.timing import CPU, Timing, interleaved

HIDDEN = 512
_ROUTER_GAIN = 0.1  # length of a router row that is planted
WORKLOADS = {
    "A": ModelConfig(num_experts=16, top_k=2, expert_intermediate_size=1024, hidden_size=HIDDEN, num_shared_experts=0),
    "B": ModelConfig(num_experts=64, top_k=6, expert_intermediate_size=256, hidden_size=HIDDEN, num_shared_experts=0),
}


class Workload:
    """Our layer of one workload, its input and cotangent."""

    def __init__(
        self,
        config: ModelConfig,
        tokens: int = 4096,
        *,
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
        choices_NK: Tensor | None = None,
    ) -> None:
        """`choices_NK`: experts that every token shall choose, by a wide margin; None leaves it to random weights."""
        torch.manual_seed(0)
        self.config = replace(config, router_score="softmax")
        with device:
            self.layer = MoELayer(self.config, parallel_size=1)
            # DeepSeek-V3 scores by a sigmoid: the same experts for the same weights, but other gates.
            self.sigmoid = MoELayer(replace(config, router_score="sigmoid"), parallel_size=1)
            for parameter in self.layer.parameters():
                nn.init.normal_(parameter, std=0.05)
            x_BTD = torch.randn(1, tokens, config.hidden_size)
            if choices_NK is not None:
                x_BTD = _choosing(x_BTD, self.layer.router.weight, choices_NK)
            self.cotangent_BTD = torch.randn(1, tokens, config.hidden_size).to(dtype)
            self._counted_BT = torch.ones(1, tokens, dtype=torch.bool)
        self.x_BTD = x_BTD.to(dtype).requires_grad_()
        self.layer.to(dtype)
        self.sigmoid.to(dtype).load_state_dict(self.layer.state_dict())

    @property
    def weights(self) -> Weights:
        return Weights(self.layer.router.weight, self.layer.experts.gate_up, self.layer.experts.down)

    def forward(self, module: nn.Module) -> Tensor:
        """The module's output, with its graph."""
        output: Tensor = module(self.x_BTD, self._counted_BT)[0] if isinstance(module, MoELayer) else module(self.x_BTD)
        return output

    def run(self, module: nn.Module) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Output, gradients of the module's parameters and of the input."""
        output = self.forward(module)
        names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        wanted = [module.get_parameter(name) for name in names]
        dx, *gradients = torch.autograd.grad(output, [self.x_BTD, *wanted], self.cotangent_BTD)
        return output, dict(zip(names, gradients, strict=True)), dx

    def check(self, peer: Peer) -> None:
        """The peer computes the same function with the same gradients, or AssertionError."""
        y, gradients, dx = self.run(peer.module)
        found = [y, dx, *peer.gradients(gradients)]
        expected = self._sigmoid_results if peer.sigmoid else self._results
        coarse = peer.bf16 or self.x_BTD.dtype == torch.bfloat16
        for what, mine, theirs in zip(("output", "x", "router", "gate_up", "down"), expected, found, strict=True):
            error = ((mine.float() - theirs.float()).norm() / mine.float().norm()).item()
            # A gate's gradient is a difference of large numbers, and peers round the gates themselves to bf16.
            tolerance = (6e-2 if what == "router" else 2e-2) if coarse else 1e-4
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
        return [y.detach(), dx, *(gradients[name] for name in ("router.weight", "experts.gate_up", "experts.down"))]

    def limit(self) -> Callable[[], None]:
        """The six products of a SwiGLU feed-forward of the same FLOPs: two forward, four backward."""
        tokens, inner = self.x_BTD.shape[1], self.config.top_k * self.config.expert_intermediate_size
        width = self.config.hidden_size
        a, b, c, d = (torch.randn(s) for s in [(tokens, width), (width, 2 * inner), (tokens, inner), (inner, width)])
        up, down = a @ b, c @ d

        def products() -> None:
            torch.mm(a, b)
            torch.mm(c, d)
            torch.mm(up, b.T)
            torch.mm(a.T, up)
            torch.mm(down, d.T)
            torch.mm(c.T, down)

        return products


def measure(report: Report, rounds: int = 3) -> None:
    """Time both workloads."""
    for name, config in WORKLOADS.items():
        workload = Workload(config)
        dense = FeedForward(HIDDEN, config.top_k * config.expert_intermediate_size)
        peers = available_peers(workload, f"moe_layer/{name}", report, PEERS)
        tasks: dict[str, Callable[[], object]] = {
            "limit": workload.limit(),
            "ours": lambda w=workload: w.run(w.layer),
            "dense": lambda w=workload, d=dense: w.run(d),
        }
        # bf16 takes half the time of fp32 on some processors and several times as long on others: few tokens, and ours
        # in bf16 beside it.
        few = Workload(config, 512)
        few_bf16 = Workload(config, 512, dtype=torch.bfloat16)
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


def _choosing(x_BTD: Tensor, router_ED: nn.Parameter, choices_NK: Tensor) -> Tensor:
    """An input that a router, given orthogonal weights here, sends where `choices_NK` says.

    Logits are 2 to 3 at the chosen experts, each another, and within a few tenths of 0 at the others: implementations
    that round differently, or to bf16, choose alike. The bulk of the input stays random.
    """
    nn.init.orthogonal_(router_ED, gain=_ROUTER_GAIN)
    num_tokens, top_k = choices_NK.shape
    strength_NK = torch.linspace(2, 3, top_k).expand(num_tokens, -1)
    strength_NE = torch.zeros(num_tokens, len(router_ED)).scatter(1, choices_NK, strength_NK)
    noise_ND = x_BTD.flatten(0, 1)
    return (noise_ND + strength_NE @ router_ED.detach() / _ROUTER_GAIN**2).view_as(x_BTD)


def available_peers(
    workload: Workload, prefix: str, report: Report, builders: Mapping[str, Builder], *, compiled: Collection[str] = ()
) -> list[Peer]:
    """Peers that run here and compute what ours does; the others are listed with the reason.

    `compiled`: names of those to be compiled first; one that does not compile is tried as it is.
    """
    few = Workload(workload.config, 512) if workload.x_BTD.dtype == torch.float32 else workload
    found = []
    for name, build in builders.items():
        for compile_it in [True, False] if name in compiled else [False]:
            key = f"{prefix}/peer/{name}" + ("/compiled" if compile_it else "")
            try:
                with workload.x_BTD.device:
                    peer = build(workload.config, workload.weights)
                peer.module.to(workload.x_BTD.dtype)
                if compile_it:
                    peer.module.compile(dynamic=False)
                (few if peer.bf16 else workload).check(peer)
            except Exception as error:  # it cannot run, or computes something else
                report.not_run(key, error)
            else:
                found.append(peer)
                break
        sys.stderr.write(f"{prefix}: {name} checked\n")
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
