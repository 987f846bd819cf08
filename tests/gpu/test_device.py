"""What differs between devices: grouped products, casts, attention. CUDA must agree with the CPU."""

from pathlib import Path

import pytest
import torch

from moe.grouped import experts_forward
from moe.latent import LatentConfig
from tests.harness import losses, run_trainings, tiny_config
from tests.moe.test_model import small_model, tokens_and_labels
from trainer.data.config import DataConfig

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


WIDE_LATENT = {
    "attention": "mla", "num_kv_heads": 4,
    "mla": LatentConfig(q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16),
}  # fmt: skip


@pytest.mark.parametrize("attention", [{"head_dim": 16}, WIDE_LATENT])
def test_documents_are_kept_apart_as_on_the_cpu(attention: dict[str, object]) -> None:
    """Compiled flex_attention with a block mask against the exact masked product, forward and backward."""
    tokens_BT, labels_BT = tokens_and_labels(length=300)
    documents_BT = (torch.rand(tokens_BT.shape, generator=torch.Generator().manual_seed(2)) < 0.05).cumsum(dim=1)
    # One expert for all: a near tie in the router would send a token elsewhere.
    shape = {"document_mask": True, "num_experts": 1, "top_k": 1, **attention}
    cpu, cuda = small_model(**shape), small_model(**shape).cuda()
    expected = cpu(tokens_BT, labels_BT, documents_BT)
    found = cuda(tokens_BT.cuda(), labels_BT.cuda(), documents_BT.cuda())
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
    expected.mean().backward()
    found.mean().backward()
    for ours, theirs in zip(cuda.parameters(), cpu.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert (ours.grad.cpu() - theirs.grad).norm() <= 1e-2 * theirs.grad.norm() + 1e-7


@pytest.mark.parametrize("masked", [False, True])
def test_forward_and_backward_do_not_wait_for_the_device(masked: bool) -> None:
    model = small_model(document_mask=masked, head_dim=16).cuda().bfloat16()
    tokens_BT, labels_BT = (tensor.cuda() for tensor in tokens_and_labels(length=256))
    documents_BT = torch.arange(256, device="cuda").expand(3, -1) // 50
    model(tokens_BT, labels_BT, documents_BT).mean().backward()  # first calls may initialise libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(tokens_BT, labels_BT, documents_BT).mean().backward()
        model.take_counts("train")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_offloaded_optimizer_steps_like_one_on_the_device(
    stage: int, tmp_path: Path, data_config: DataConfig
) -> None:
    """From host memory, with host kernels, and after a restart that reads its numbers into host memory."""
    common = {"precision": "bf16", "zero_stage": stage}
    schedule = {"shape": "constant", "warmup_steps": 3}  # does not depend on the number of steps
    config = tiny_config(
        tmp_path, data_config, engine=common, schedule=schedule, evaluation={"every": 0, "max_rows": 1}
    )
    for name, overrides in {
        "device": [],
        "host": ["engine.offload_optimizer=true", "train.steps=8"],
        "host again": ["engine.offload_optimizer=true"],
    }.items():
        run_dir = tmp_path / name.split()[0]
        run_trainings([(config, [*overrides, f"run_dir={run_dir}"])], ranks=1)
    assert losses(tmp_path / "host") == pytest.approx(losses(tmp_path / "device"), rel=1e-3)
