"""`gpu/moe_layer` and `gpu/skew`: one MoE layer in bf16 against its bound and its peers, and under skewed routing.

Inputs are made so that every token chooses given experts by a wide margin: all implementations route alike although
some of them score in bf16, and how even the loads are is ours to set.

Shape letters: N tokens, D model width, F expert width, E experts, K experts a token uses, C rows of an expert, R rows
(a token's copies for its experts).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.balance_metrics import max_violation
from moe.config import ModelConfig
from moe.grouped import experts_forward, sorted_rows
from moe.router import count_tokens, uniform_experts
from tests.bench.layer import Workload, available_peers
from tests.bench.peers import GPU_PEERS
from tests.bench.report import Report
from tests.bench.timing import Timing, interleaved, stopwatch

ZIPF_EXPONENT = 1.0
COMPILED = ("transformers_qwen3_grouped_mm", "torchtitan_bf16")


class Shape(NamedTuple):
    """A layer and how many tokens it is given at once."""

    num_experts: int
    top_k: int
    hidden_size: int
    expert_size: int
    tokens: int

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(
            num_experts=self.num_experts, top_k=self.top_k, hidden_size=self.hidden_size,
            expert_intermediate_size=self.expert_size, num_shared_experts=0,
        )  # fmt: skip


SHAPES = {
    "E64k8F1024": Shape(64, 8, 2048, 1024, 32768),
    "E128k8F768": Shape(128, 8, 2048, 768, 32768),
    "E64k6F1408": Shape(64, 6, 2048, 1408, 16384),
}


def balanced_choices(shape: Shape, device: torch.device) -> Tensor:
    """Every expert chosen equally often, tokens in random order, int64 [N, K]."""
    dealt_NK = uniform_experts(shape.tokens, shape.top_k, shape.num_experts, device)
    return dealt_NK[torch.randperm(shape.tokens, device=device)]


def zipf_choices(shape: Shape, device: torch.device) -> Tensor:
    """Distinct experts drawn with probability falling as 1 / rank, int64 [N, K]."""
    rank_E = torch.arange(1, shape.num_experts + 1, dtype=torch.float32, device=device)
    gumbel_NE = -torch.empty(shape.tokens, shape.num_experts, device=device).exponential_().log()
    return (gumbel_NE - ZIPF_EXPONENT * rank_E.log()).topk(shape.top_k, dim=-1).indices


def workload_of(shape: Shape, device: torch.device, choices_NK: Tensor) -> Workload:
    """The layer in bf16 with an input that makes it choose so; AssertionError if it does not."""
    workload = Workload(shape.config, shape.tokens, device=device, dtype=torch.bfloat16, choices_NK=choices_NK)
    counted_N = torch.ones(shape.tokens, dtype=torch.bool, device=device)
    with torch.no_grad():
        found_NK = workload.layer.router(workload.x_BTD[0], counted_N).indices_NK
    assert torch.equal(found_NK.sort(dim=-1).values, choices_NK.sort(dim=-1).values), "the input does not route as told"
    return workload


class Bound:
    """The least a layer of balanced experts can take: cuBLAS's batched products, activation and aggregation.

    No router, no gather of rows and no scatter of their gradients: a kernel may do these while it loads and stores.
    """

    def __init__(self, workload: Workload, choices_NK: Tensor) -> None:
        gate_up, down = workload.weights.gate_up.detach(), workload.weights.down.detach()
        self.x_ND, self.choices_NK = workload.x_BTD[0].detach(), choices_NK
        self.gates_NK = torch.rand(choices_NK.shape, device=self.x_ND.device).to(self.x_ND.dtype)
        self.gate_up_EDF2, self.down_EFD = gate_up, down
        order_R, _ = sorted_rows(choices_NK, len(gate_up))
        self.place_NK = torch.empty_like(order_R).index_copy(
            0, order_R, torch.arange(len(order_R), device=order_R.device)
        )
        self.place_NK = self.place_NK.view_as(choices_NK)
        token_R = order_R // choices_NK.shape[1]
        by_expert = (len(gate_up), -1)
        self.x_ECD = self.x_ND[token_R].unflatten(0, by_expert)
        scaled_RD = workload.cotangent_BTD[0][token_R] * self.gates_NK.flatten()[order_R].unsqueeze(1)
        self.d_outputs_ECD = scaled_RD.unflatten(0, by_expert)
        fuse = torch.compile if self.x_ND.is_cuda else _as_it_is
        self._swiglu, self._swiglu_backward, self._aggregate = map(fuse, (_swiglu, _swiglu_backward, _aggregate))
        self.hidden_ECF2 = torch.bmm(self.x_ECD, gate_up)
        self.active_ECF = self._swiglu(self.hidden_ECF2)

    def forward(self) -> Tensor:
        """Output of the experts, [N, D]."""
        active_ECF = self._swiglu(torch.bmm(self.x_ECD, self.gate_up_EDF2))
        outputs_RD = torch.bmm(active_ECF, self.down_EFD).flatten(0, 1)
        output: Tensor = self._aggregate(outputs_RD, self.place_NK, self.gates_NK)
        return output

    def backward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of input, gate_up and down."""
        d_active_ECF = torch.bmm(self.d_outputs_ECD, self.down_EFD.transpose(1, 2))
        d_down_EFD = torch.bmm(self.active_ECF.transpose(1, 2), self.d_outputs_ECD)
        d_hidden_ECF2 = self._swiglu_backward(self.hidden_ECF2, d_active_ECF)
        d_gate_up_EDF2 = torch.bmm(self.x_ECD.transpose(1, 2), d_hidden_ECF2)
        d_rows_RD = torch.bmm(d_hidden_ECF2, self.gate_up_EDF2.transpose(1, 2)).flatten(0, 1)
        return self._aggregate(d_rows_RD, self.place_NK, None), d_gate_up_EDF2, d_down_EFD

    def both(self) -> None:
        """Forward and backward."""
        self.forward()
        self.backward()

    def check(self, cotangent_ND: Tensor) -> None:
        """It is the arithmetic of our experts, or AssertionError."""
        leaves = [t.clone().requires_grad_() for t in (self.x_ND, self.gate_up_EDF2, self.down_EFD)]
        output_ND = experts_forward(leaves[0], self.choices_NK, self.gates_NK.float(), leaves[1], leaves[2])
        expected = [output_ND, *torch.autograd.grad(output_ND, leaves, cotangent_ND)]
        for mine, theirs in zip(expected, [self.forward(), *self.backward()], strict=True):
            error = ((mine.float() - theirs.float()).norm() / mine.float().norm()).item()
            assert error < 2e-2, f"the bound is not the layer's arithmetic: {error:.1e}"


def _as_it_is(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return function


def _swiglu(hidden: Tensor) -> Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate) * up


def _swiglu_backward(hidden: Tensor, d_active: Tensor) -> Tensor:
    gate, up = hidden.float().chunk(2, dim=-1)
    sigmoid, d_wide = gate.sigmoid(), d_active.float()
    d_gate = d_wide * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([d_gate, d_wide * gate * sigmoid], dim=-1).to(hidden.dtype)


def _aggregate(rows_RD: Tensor, place_NK: Tensor, gates_NK: Tensor | None) -> Tensor:
    rows_NKD = rows_RD[place_NK]
    return (rows_NKD if gates_NK is None else rows_NKD * gates_NK.unsqueeze(-1)).sum(dim=1)


def measure(
    report: Report, device: torch.device, *, shapes: Mapping[str, Shape] = SHAPES, rounds: int = 20, warm_up: int = 3
) -> None:
    """Bound over ours and peers over ours, forward and both passes; forced-balanced routing."""
    watch = stopwatch(device)
    for name, shape in shapes.items():
        torch.manual_seed(0)
        choices_NK = balanced_choices(shape, device)
        workload = workload_of(shape, device, choices_NK)
        bound = Bound(workload, choices_NK)
        bound.check(workload.cotangent_BTD[0])
        prefix = f"gpu/moe_layer/{name}"
        compiled = COMPILED if device.type == "cuda" else ()
        peers = available_peers(workload, prefix, report, GPU_PEERS, compiled=compiled)
        passes: dict[str, tuple[Callable[..., object], Callable[[], object]]] = {
            "forward": (workload.forward, bound.forward),
            "both": (workload.run, bound.both),
        }
        for part, (run, at_best) in passes.items():
            tasks = {"ours": lambda r=run, w=workload: r(w.layer), "bound": at_best}
            tasks |= {peer.name: lambda r=run, p=peer: r(p.module) for peer in peers}
            times = interleaved(tasks, rounds=rounds, warm_up=warm_up, watch=watch)
            ours = times.pop("ours")
            note = f"{1e3 * ours.median:.3f} ms, {_tflops(shape, part, ours):.0f} TFLOP/s, {shape.tokens} tokens"
            for other, timing in times.items():
                ratios = timing.median / ours.median, timing.minimum / ours.minimum
                if other == "bound":
                    report.add(f"{prefix}/{part}/bound_over_ours", *ratios, note=note)
                    continue
                is_compiled = other in compiled and f"{prefix}/peer/{other}/compiled" not in report.missing
                report.add(f"{prefix}/{part}/peer/{other}", *ratios, note="compiled" if is_compiled else "")


def measure_skew(
    report: Report, device: torch.device, *, shapes: Mapping[str, Shape] = SHAPES, rounds: int = 20, warm_up: int = 3
) -> None:
    """Time of both passes when loads follow Zipf's law, over that of even loads."""
    watch = stopwatch(device)
    for name, shape in shapes.items():
        torch.manual_seed(0)
        choices = {"balanced": balanced_choices(shape, device), "zipf": zipf_choices(shape, device)}
        workloads = {kind: workload_of(shape, device, choices_NK) for kind, choices_NK in choices.items()}
        tasks = {kind: lambda w=workload: w.run(w.layer) for kind, workload in workloads.items()}
        times = interleaved(tasks, rounds=rounds, warm_up=warm_up, watch=watch)
        everyone_N = torch.ones(shape.tokens, dtype=torch.bool, device=device)
        violation = max_violation(count_tokens(choices["zipf"], everyone_N, shape.num_experts)).item()
        of, to = times["zipf"], times["balanced"]
        report.add(f"gpu/skew/{name}", of.median / to.median, of.minimum / to.minimum, note=f"MaxVio {violation:.2f}")


def _tflops(shape: Shape, part: str, timing: Timing) -> float:
    products = {"forward": 2, "both": 6}[part]
    flops = products * shape.tokens * shape.top_k * 3 * shape.hidden_size * shape.expert_size
    return flops / timing.median / 1e12
