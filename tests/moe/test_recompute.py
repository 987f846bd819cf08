"""Recomputation policies: the same bits, as few products as without where that is promised, and as little memory."""

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import moe.model
import moe.recompute
from moe.arithmetic import activation_bytes, head_bytes
from moe.config import AuxLossConfig, ModelConfig
from moe.model import MoEDecoder
from tests.moe.test_model import LATENT, SMALL, VOCAB, tokens_and_labels

POLICIES = ("none", "selective", "block")
FAMILIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {
        "qk_norm": True, "attention_bias": True, "mtp_weight": 0.3, "router_jitter": 0.1, "document_mask": True,
        "capacity_factor": 1.0, "aux_loss": AuxLossConfig(switch=0.01, sequence=0.01, z=0.001),
    },
    "latent": LATENT,
    "without shared experts": {"num_shared_experts": 0, "num_dense_layers": 0},
}  # fmt: skip


class Products(TorchDispatchMode):
    """Counts the operations that selective recomputation must not run again."""

    NAMES = ("mm", "addmm", "bmm", "_grouped_mm", "_scaled_dot_product", "experts_forward", "experts_backward")

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function.overloadpacket).partition(".")[2]
        self.seen[name] += name.startswith(self.NAMES)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_policies_give_the_same_bits_and_selective_runs_no_product_twice(family: str, dtype: torch.dtype) -> None:
    tokens_BT, labels_BT = tokens_and_labels()
    documents_BT = (torch.arange(12) // 5).expand(3, -1)
    results: list[list[Tensor | None]] = []
    products = []
    for policy in POLICIES:
        torch.manual_seed(0)
        config = dataclasses.replace(SMALL, activation_recompute=policy, dropout=0.2, **FAMILIES[family])
        model = MoEDecoder(config, vocab_size=VOCAB).to(dtype)
        torch.manual_seed(5)
        with Products() as counted:
            output = model(tokens_BT, labels_BT, documents_BT)
            losses_BT, penalty = (output, None) if isinstance(output, Tensor) else output[:2]
            (losses_BT.mean() + (0 if penalty is None else penalty.mean())).backward()
        loads = [stats.counts_E for stats in model.take_loads("train")]
        results.append([losses_BT, *(parameter.grad for parameter in model.parameters()), *loads])
        products.append({name: number for name, number in counted.seen.items() if number})
    for recomputed in results[1:]:
        for ours, kept in zip(recomputed, results[0], strict=True):
            assert (ours is None and kept is None) or torch.equal(ours, kept)  # type: ignore[arg-type]
    assert products[1] == products[0]
    assert sum(products[2].values()) > sum(products[0].values())


def kept_bytes(config: ModelConfig, dtype: torch.dtype, tokens_BT: Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of all different storages that a forward keeps for its backward, parameters apart."""
    torch.manual_seed(0)
    model = MoEDecoder(config, vocab_size=VOCAB).to(dtype)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    alive: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            alive[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def checkpoint(function: Any, *inputs: Any, **options: Any) -> Any:
        # A checkpoint keeps its inputs, and none of what is saved inside.
        for tensor in inputs:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                pack(tensor)
        with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            return function(*inputs)

    monkeypatch.setattr(moe.recompute, "checkpoint", checkpoint)
    monkeypatch.setattr(moe.model, "checkpoint", checkpoint)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens_BT)
    return sum(tensor.untyped_storage().nbytes() for tensor in alive.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["plain", "everything", "latent"])
def test_what_is_kept_is_what_the_arithmetic_says(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the experts' loop in float32, by grouped products in bf16, as on a GPU."""
    shape = dataclasses.replace(
        SMALL, hidden_size=64, head_dim=16, num_layers=4, expert_intermediate_size=48, dense_intermediate_size=192,
        **(FAMILIES[family] | {"mtp_weight": 0.0, "document_mask": False, "router_jitter": 0.0}),
    ) if family != "latent" else dataclasses.replace(SMALL, hidden_size=64, num_layers=4, **LATENT)  # fmt: skip
    tokens_BT = torch.arange(8 * 64).view(8, 64) % VOCAB
    found = {}
    for policy in ("none", "selective"):
        config = dataclasses.replace(shape, activation_recompute=policy)
        estimate = activation_bytes(config, VOCAB, tokens=512, element_bytes=dtype.itemsize)
        estimate -= head_bytes(config, VOCAB, tokens=512)
        found[policy] = kept_bytes(config, dtype, tokens_BT, monkeypatch)
        assert estimate == pytest.approx(found[policy], rel=0.1), policy
    assert found["selective"] < (0.78 if dtype == torch.float32 else 0.57) * found["none"]
