"""The arithmetic of the routed experts: exact in every type, for any load, whatever is asked of it.

`naive_experts`, a loop over tokens under autograd, is the reference; its random-shape comparison is in `test_model`.
Every test runs on both loops of the CPU experts, the compiled one and the one in plain torch.

Shape letters: N tokens, K experts a token uses, E experts, D model width, F expert width.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from moe import native
from moe.grouped import experts_forward
from tests.moe.test_model import naive_experts

NAMES = ("x_ND", "gates_NK", "gate_up_EDF2", "down_EFD")


@pytest.fixture(scope="module", params=["compiled", "plain torch"], autouse=True)
def loop(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which loop `experts_forward` runs in float32 and float64 on a CPU."""
    native.build()  # in an environment that `make setup` made, it is there
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain torch":
            patch.setattr(native, "available", lambda: False)
        assert native.available() == (request.param == "compiled")
        yield request.param


class Case(NamedTuple):
    """Inputs of `experts_forward` in its order, and a cotangent of its output."""

    x_ND: Tensor
    indices_NK: Tensor
    gates_NK: Tensor
    gate_up_EDF2: Tensor
    down_EFD: Tensor
    cotangent_ND: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [getattr(self, name) for name in NAMES]

    def forward(self, function: Callable[..., Tensor] = experts_forward) -> Tensor:
        return function(*self[:5])

    def gradients(self, output: Tensor) -> list[Tensor]:
        wanted = [leaf for leaf in self.leaves if leaf.requires_grad]
        return list(torch.autograd.grad(output, wanted, self.cotangent_ND))


def case(
    *,
    tokens: int = 23,
    top_k: int = 2,
    experts: int = 5,
    width: int = 8,
    intermediate: int = 6,
    busy: int | None = None,
    dtype: torch.dtype = torch.float32,
    requiring: tuple[str, ...] = NAMES,
    seed: int = 0,
) -> Case:
    """Random routing among the first `busy` experts (all, if None); the rest are empty."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    indices_NK = torch.rand(tokens, busy or experts, generator=generator).topk(top_k).indices
    made = Case(
        normal(tokens, width),
        indices_NK,
        # As the router gives them: never less precise than float32.
        torch.rand(tokens, top_k, generator=generator).to(torch.promote_types(dtype, torch.float32)),
        normal(experts, width, 2 * intermediate),
        normal(experts, intermediate, width),
        normal(tokens, width),
    )
    for name in requiring:
        getattr(made, name).requires_grad_()
    return made


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(0, 17),
    top_k=st.integers(1, 3),
    busy=st.integers(3, 6),
    zero_gates=st.booleans(),
)
def test_doubles_equal_a_loop_to_the_last_digits(
    seed: int, tokens: int, top_k: int, busy: int, zero_gates: bool
) -> None:
    given_case = case(seed=seed, tokens=tokens, top_k=top_k, experts=6, busy=busy, dtype=torch.float64)
    if zero_gates:  # a choice dropped for capacity has gate 0, and its gate still has a gradient
        with torch.no_grad():
            given_case.gates_NK[::2] = 0
    ours = given_case.forward()
    if tokens == 0:
        assert not any(gradient.any() for gradient in given_case.gradients(ours))
        return
    theirs = given_case.forward(naive_experts)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    for mine, expected in zip(given_case.gradients(ours), given_case.gradients(theirs), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-10)


def test_gradients_equal_finite_differences() -> None:
    tried = case(tokens=5, experts=4, busy=3, width=3, intermediate=2, dtype=torch.float64)

    def function(x_ND: Tensor, gates_NK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return experts_forward(x_ND, tried.indices_NK, gates_NK, gate_up, down)

    assert torch.autograd.gradcheck(function, tuple(tried.leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_off_by_its_own_rounding_only(dtype: torch.dtype) -> None:
    # Widths and row counts that are no multiple of what a vector unit takes, but 16 bytes as grouped products ask.
    rough = case(tokens=37, top_k=3, experts=7, busy=6, width=24, intermediate=40, dtype=dtype)
    exact = Case(*(tensor.detach().double() if tensor.is_floating_point() else tensor for tensor in rough))
    for leaf in exact.leaves:
        leaf.requires_grad_()
    ours, expected = rough.forward(), exact.forward(naive_experts)
    assert ours.dtype == dtype
    pairs = [(ours, expected), *zip(rough.gradients(ours), exact.gradients(expected), strict=True)]
    for mine, true in pairs:
        error = (mine.double() - true).norm() / true.norm()
        assert error < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twice_the_same_is_the_same_to_the_bit(dtype: torch.dtype) -> None:
    tried = case(tokens=301, top_k=4, experts=8, width=32, intermediate=16, dtype=dtype)
    runs = []
    for _ in range(2):
        output = tried.forward()
        runs.append([output, *tried.gradients(output)])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["x_ND", "gate_up_EDF2", "down_EFD"])
def test_no_tokens_reach_every_parameter(name: str, dtype: torch.dtype) -> None:
    """A rank without tokens must have a gradient, of zeros, to bring to the reduction."""
    tried = case(tokens=0, width=8, intermediate=8, dtype=dtype)
    output = tried.forward()
    assert output.shape == (0, 8)
    output.sum().backward()
    gradient = getattr(tried, name).grad
    assert gradient is not None
    assert gradient.shape == getattr(tried, name).shape
    assert not gradient.any()


def test_experts_without_tokens_have_zero_gradients_even_over_used_memory() -> None:
    # Memory just freed is what the allocator hands out next: an unwritten gradient would show it.
    tried = case(tokens=40, experts=12, busy=3, width=32, intermediate=16)
    for _ in range(3):
        junk = [torch.full_like(leaf, float("nan")) for leaf in tried.leaves]
        del junk
        *_, d_gate_up, d_down = tried.gradients(tried.forward())
        for gradient in (d_gate_up, d_down):
            assert not gradient[3:].any()
            assert gradient[:3].isfinite().all()
            assert gradient[:3].flatten(1).any(dim=1).all()


@pytest.mark.parametrize("requiring", [(name,) for name in NAMES] + [NAMES[:2], NAMES[2:]])
def test_any_of_the_inputs_may_be_the_one_that_needs_a_gradient(requiring: tuple[str, ...]) -> None:
    every, some = case(), case(requiring=requiring)
    gradients = dict(zip(NAMES, every.gradients(every.forward()), strict=True))
    for name, gradient in zip(requiring, some.gradients(some.forward()), strict=True):
        assert torch.equal(gradient, gradients[name])


def test_without_gradients_the_output_is_the_same() -> None:
    tried = case()
    expected = tried.forward()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            found = tried.forward()
        assert not found.requires_grad
        assert torch.equal(found, expected)
    frozen = case(requiring=())
    assert torch.equal(frozen.forward(), expected)
    assert not frozen.forward().requires_grad


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_changes_no_bit(use_reentrant: bool) -> None:
    tried = case()
    expected = tried.gradients(tried.forward())
    output = checkpoint(experts_forward, *tried[:5], use_reentrant=use_reentrant)
    output.backward(tried.cotangent_ND)
    for leaf, gradient in zip(tried.leaves, expected, strict=True):
        assert torch.equal(leaf.grad, gradient)


def test_two_backwards_through_one_graph_agree() -> None:
    """Nothing that the backward was given is scratch: a graph that is kept can be used again."""
    tried = case()
    output = tried.forward()
    first = torch.autograd.grad(output, tried.leaves, tried.cotangent_ND, retain_graph=True)
    for mine, again in zip(first, tried.gradients(output), strict=True):
        assert torch.equal(mine, again)


def test_inputs_and_cotangent_are_left_as_they_were() -> None:
    tried = case()
    before = [tensor.detach().clone() for tensor in tried]
    tried.gradients(tried.forward())
    for tensor, copy in zip(tried, before, strict=True):
        assert torch.equal(tensor, copy)


def test_a_cotangent_need_not_be_contiguous() -> None:
    tried = case()
    expected = tried.gradients(tried.forward())
    strided_ND = tried.cotangent_ND.T.contiguous().T
    assert not strided_ND.is_contiguous()
    for mine, true in zip(tried._replace(cotangent_ND=strided_ND).gradients(tried.forward()), expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-6, atol=1e-6)
    # The sum of outputs has a cotangent of stride zero.
    tried.forward().sum().backward()
    ones = tried._replace(cotangent_ND=torch.ones_like(tried.cotangent_ND))
    for leaf, true in zip(tried.leaves, ones.gradients(ones.forward()), strict=True):
        torch.testing.assert_close(leaf.grad, true, rtol=1e-6, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation has returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes) if sizes else self.elements
        return result


def test_tokens_are_never_copied_for_all_their_experts_at_once() -> None:
    # Of the compiled loop only what it returns is seen here; `make bench` measures its memory.
    tokens, top_k, width = 64, 4, 128
    tried = case(tokens=tokens, top_k=top_k, experts=6, width=width, intermediate=4)
    with LargestTensor() as largest:
        tried.gradients(tried.forward())
    assert tokens * width <= largest.elements < tokens * top_k * width


WITHOUT_LIBRARY = """
import logging, sys, torch
logging.basicConfig(stream=sys.stdout)
from moe import native
from moe.grouped import experts_forward
gate_up, down = torch.ones(2, 8, 8), torch.ones(2, 4, 8)
for _ in range(2):
    experts_forward(torch.ones(2, 8), torch.tensor([[0], [1]]), torch.ones(2, 1), gate_up, down)
"""


@pytest.mark.parametrize(("spoil", "reason"), [(False, "run python -m launch.warmup"), (True, "evenkeel_cpu_experts")])
def test_without_its_library_it_runs_and_says_so_once(tmp_path: Path, spoil: bool, reason: str) -> None:
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    if spoil:
        (tmp_path / native.library_path().name).write_bytes(b"not a library")
    done = subprocess.run([sys.executable, "-c", WITHOUT_LIBRARY], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("plain torch") == 1
    assert reason in done.stdout


def test_threads_lose_no_row() -> None:
    tried = case(tokens=700, top_k=3, experts=4, width=512, intermediate=64, dtype=torch.float64)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            output = tried.forward()
            results.append([output, *tried.gradients(output)])
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        # The products are the library's, which may cut them by threads.
        torch.testing.assert_close(one, three, rtol=1e-12, atol=1e-12)
