"""The head, whole and in tiles of the vocabulary: autograd's losses and gradients, in a part of its memory."""

import dataclasses
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from moe.arithmetic import head_bytes
from moe.config import ModelConfig
from moe.loss_head import TILE_BYTES, OutputHead, tile_size, tiled_cross_entropy, whole_cross_entropy
from moe.model import MoEDecoder
from tests.moe.test_model import SMALL, VOCAB, tokens_and_labels


def plain(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(hidden_ND @ weight_VD.t(), labels_N, reduction="none")


@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(0, 12),
    vocab=st.integers(1, 40),
    tile=st.integers(1, 45) | st.none(),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_losses_and_gradients_equal_the_plain_head_for_any_later_weights(
    seed: int, tokens: int, vocab: int, tile: int | None, scale: float, ignored: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(tokens, 8, dtype=torch.float64, generator=generator).requires_grad_()
    weight_VD = (scale * torch.randn(vocab, 8, dtype=torch.float64, generator=generator)).requires_grad_()
    labels_N = torch.randint(0, vocab, (tokens,), generator=generator)
    labels_N[torch.rand(tokens, generator=generator) < ignored] = -100
    ours_N = (
        whole_cross_entropy(hidden_ND, weight_VD, labels_N)
        if tile is None
        else tiled_cross_entropy(hidden_ND, weight_VD, labels_N, tile)
    )
    theirs_N = plain(hidden_ND, weight_VD, labels_N)
    torch.testing.assert_close(ours_N, theirs_N, rtol=1e-12, atol=1e-12)
    # Weights as hooks set them: of any sign and size, zero too, after the forward is done.
    weights_N = torch.randn(tokens, dtype=torch.float64, generator=generator)
    weights_N[::3] = 0
    found = torch.autograd.grad((weights_N * ours_N).sum(), [hidden_ND, weight_VD])
    expected = torch.autograd.grad((weights_N * theirs_N).sum(), [hidden_ND, weight_VD])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_finite_differences_agree() -> None:
    hidden_ND = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight_VD = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    labels_N = torch.tensor([0, 6, -100, 3, 3])
    assert torch.autograd.gradcheck(lambda h, w: tiled_cross_entropy(h, w, labels_N, 3), (hidden_ND, weight_VD))


def test_a_second_backward_through_overwritten_logits_is_refused() -> None:
    hidden_ND = torch.randn(5, 4, requires_grad=True)
    loss = whole_cross_entropy(hidden_ND, torch.randn(7, 4), torch.arange(5)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("tile", [2, 9])
def test_logits_that_would_overflow_and_underflow_are_fine(tile: int) -> None:
    hidden_ND = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    head = OutputHead(1, 9, loss_tile=tile)
    head.weight.data.copy_(torch.linspace(-1, 1, 9).unsqueeze(1))
    losses_N = head(hidden_ND, torch.tensor([8, 8]))
    torch.testing.assert_close(losses_N, torch.tensor([0.0, 2e4]))
    losses_N.sum().backward()
    assert hidden_ND.grad is not None
    assert hidden_ND.grad.isfinite().all()


def test_bf16_is_as_close_to_the_truth_as_the_plain_head_and_losses_are_float32() -> None:
    torch.manual_seed(0)
    hidden_ND, weight_VD = torch.randn(64, 32), 0.3 * torch.randn(500, 32)
    labels_N = torch.randint(0, 500, (64,))
    weights_N = torch.rand(64)

    def run(dtype: torch.dtype, tile: int | None) -> tuple[torch.Tensor, ...]:
        head = OutputHead(32, 500, loss_tile=tile or 500).to(dtype)
        head.weight.data.copy_(weight_VD)
        leaf_ND = hidden_ND.to(dtype, copy=True).requires_grad_()
        usual_N = F.cross_entropy(head(leaf_ND).float(), labels_N, reduction="none")
        losses_N = usual_N if tile is None else head(leaf_ND, labels_N)
        assert losses_N.dtype == torch.float32
        (losses_N * weights_N).sum().backward()
        assert leaf_ND.grad is not None
        assert head.weight.grad is not None
        assert leaf_ND.grad.dtype == head.weight.grad.dtype == dtype
        return losses_N.detach(), leaf_ND.grad.float(), head.weight.grad.float()

    truth, usual = run(torch.float32, None), run(torch.bfloat16, None)
    for found in (run(torch.bfloat16, 64), run(torch.bfloat16, 500)):
        torch.testing.assert_close(found[0], usual[0], rtol=1e-5, atol=1e-5)  # the same rounded logits
        for true, theirs, ours in zip(truth, usual, found, strict=True):
            assert (ours - true).norm() <= 1.2 * (theirs - true).norm()


@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": True}, {"mtp_weight": 0.3}, {"activation_recompute": "block"}]
)
def test_a_model_learns_the_same_from_tiles(changes: dict[str, object]) -> None:
    tokens_BT, labels_BT = tokens_and_labels()
    labels_BT[1, 4:] = -100
    seen = []
    for tile in (VOCAB, 7):
        torch.manual_seed(0)
        model = MoEDecoder(dataclasses.replace(SMALL, loss_tile=tile, **changes), vocab_size=VOCAB)
        output = model(tokens_BT, labels_BT)
        losses_BT = output if isinstance(output, torch.Tensor) else output[0] + output[1].mean()
        (losses_BT * torch.arange(1.0, 4).unsqueeze(1)).sum().backward()
        seen.append((losses_BT, [parameter.grad for parameter in model.parameters()]))
    (plain_BT, plain_gradients), (tiled_BT, tiled_gradients) = seen
    assert not tiled_BT[1, 4:].any() or "mtp_weight" in changes
    torch.testing.assert_close(tiled_BT, plain_BT, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(tiled_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_tile_is_chosen_by_memory() -> None:
    assert tile_size(0, 512, 4096) == 4096  # the quickstart: all at once
    for tokens in (1024, 8192, 2**16):
        tile = tile_size(0, tokens, 128_000)
        assert tile < 128_000
        assert 4 * tokens * tile <= TILE_BYTES or tile == 1024
    assert tile_size(300, 8, 4096) == 300
    assert tile_size(10_000, 8, 4096) == 4096
    assert any("loss_tile" in line for line in ModelConfig(loss_tile=-1).problems())


PEAK = """
import sys, torch
from pathlib import Path
import torch.nn.functional as F
from moe.loss_head import OutputHead
def resident(field):
    return next(int(l.split()[1]) for l in Path('/proc/self/status').read_text().splitlines() if l.startswith(field))
torch.set_num_threads(1)
tokens, vocab = 1024, 65536
tile = int(sys.argv[1])
head = OutputHead(16, vocab, loss_tile=max(tile, 0))
head.weight.grad = torch.zeros_like(head.weight)
for n in (2, tokens):
    hidden = torch.randn(n, 16, requires_grad=True)
    Path('/proc/self/clear_refs').write_text('5')
    before = resident('VmRSS:')
    labels = torch.randint(0, vocab, (n,))
    losses = F.cross_entropy(head(hidden), labels, reduction="none") if tile < 0 else head(hidden, labels)
    losses.sum().backward()
print((resident('VmHWM:') - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_what_the_arithmetic_says() -> None:
    """Measured in processes of their own: tiles at most an eighth of the plain head's, the whole head 2/5 of it, and
    that within a fifth of head_bytes."""

    def peak(tile: int) -> float:
        done = subprocess.run([sys.executable, "-c", PEAK, str(tile)], capture_output=True, text=True, check=True)
        return float(done.stdout)

    usual, whole, tiled = peak(-1), peak(65536), peak(0)
    assert tiled <= usual / 8
    assert whole <= usual * 0.4
    config = ModelConfig(loss_tile=65536)
    assert whole == pytest.approx(head_bytes(config, 65536, tokens=1024), rel=0.2)


def test_a_training_has_the_same_losses() -> None:
    """Thirty steps of AdamW with weights that depend on the losses; experts in turn, for a tie broken the other way by
    rounding would send a token elsewhere and say nothing about the head."""
    losses = []
    for tile in (VOCAB, 16):
        torch.manual_seed(0)
        model = MoEDecoder(dataclasses.replace(SMALL, loss_tile=tile, uniform_routing=True), vocab_size=VOCAB)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(2)
        seen = []
        for _ in range(30):
            stream = torch.randint(0, VOCAB, (4, 17), generator=generator)
            losses_B = model(stream[:, :-1], stream[:, 1:].clone()).mean(dim=1)
            (losses_B.detach().softmax(dim=0) * losses_B).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(losses_B.mean().item())
        losses.append(seen)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] != [losses[0][0]] * 30
