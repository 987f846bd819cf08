"""What differs between devices: grouped products, casts, attention. CUDA must agree with the CPU."""

import pytest
import torch

from moe.grouped import experts_forward
from tests.moe.test_model import small_model, tokens_and_labels

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("skewed", [False, True])
def test_experts_agree_with_the_cpu(dtype: torch.dtype, tolerance: float, skewed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    bias = torch.tensor([9.0, 8, 7, 6, 0, 0, 0, 0]) * skewed
    indices = (torch.rand(100, 8, generator=generator) + bias).topk(2).indices
    leaves = [torch.randn(s, generator=generator) * 0.3 for s in [(100, 32), (100, 2), (8, 32, 64), (8, 32, 32)]]
    cotangent = torch.randn(100, 32, generator=generator)
    results = []
    for device in ("cpu", "cuda"):
        own = [leaf.to(device, torch.float32 if i == 1 else dtype).requires_grad_() for i, leaf in enumerate(leaves)]
        out = experts_forward(own[0], indices.to(device), own[1], own[2], own[3])
        gradients = torch.autograd.grad(out, own, cotangent.to(device, dtype))
        results.append([out, *gradients])
    for cpu, cuda in zip(*results, strict=True):
        assert (cuda.cpu().float() - cpu.float()).norm() <= tolerance * cpu.float().norm()


def test_model_agrees_with_the_cpu_and_counts_the_same() -> None:
    tokens_BT, labels_BT = tokens_and_labels()
    cpu, cuda = small_model(), small_model().cuda()
    expected, found = cpu(tokens_BT, labels_BT), cuda(tokens_BT.cuda(), labels_BT.cuda())
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
    for counts, cuda_counts in zip(cpu.take_counts("train"), cuda.take_counts("train"), strict=True):
        assert (counts - cuda_counts.cpu()).abs().sum() <= 4, "a near tie may fall the other way"


def test_forward_and_backward_do_not_wait_for_the_device() -> None:
    model = small_model().cuda().bfloat16()
    tokens_BT, labels_BT = (tensor.cuda() for tensor in tokens_and_labels())
    model(tokens_BT, labels_BT).mean().backward()  # first calls may initialise libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(tokens_BT, labels_BT).mean().backward()
        model.take_counts("train")
    finally:
        torch.cuda.set_sync_debug_mode("default")
