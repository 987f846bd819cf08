"""The weights of a model as one file of whole tensors, and back, however the model is spread over ranks."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.errors import CheckpointError

Gathering = Callable[[nn.Parameter], AbstractContextManager[None]]


def _as_it_is(parameter: nn.Parameter) -> AbstractContextManager[None]:
    return nullcontext()


def whole_weights(model: nn.Module, whole: Gathering = _as_it_is, *, keep: bool = True) -> dict[str, Tensor]:
    """Copies of parameters and persistent buffers on the host, tied ones once, cut ones put together.

    `whole`: what makes a parameter whole while it is read (Engine.whole). A collective: every rank calls it; one
    without `keep` only lends its parts and gets nothing.
    """
    found = {}
    for name, tensor in _weights(model).items():
        group = expert_group(model, name)
        with whole(tensor) if isinstance(tensor, nn.Parameter) else nullcontext():
            value = tensor.detach()
            if group is not None:
                parts = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
                dist.all_gather(parts, value.contiguous(), group=group)
                value = torch.cat(parts)
            if keep:
                found[name] = value.to("cpu", copy=True).contiguous()
    return found


@torch.no_grad()
def load_weights(model: nn.Module, path: Path, whole: Gathering = _as_it_is) -> None:
    """Read `model.safetensors` into a model of the same shape; of sharded experts, this rank's share.

    `whole`: what makes a parameter whole while it is written (Engine.whole).
    Raises CheckpointError that names the first tensor that does not fit.
    """
    saved, own = safetensors.torch.load_file(path), _weights(model)
    for name in sorted(saved.keys() | own.keys()):
        tensor, target = saved.get(name), own.get(name)
        group = None if target is None else expert_group(model, name)
        if tensor is not None and group is not None:
            tensor = tensor.chunk(dist.get_world_size(group))[dist.get_rank(group)]
        shape = None if target is None else getattr(target, "ds_shape", target.shape)
        if tensor is None or target is None or tensor.shape != shape:
            raise CheckpointError(f"{path}: {name} does not fit the model; it was saved by a model of another shape")
        with whole(target) if isinstance(target, nn.Parameter) else nullcontext():
            target.detach().copy_(tensor)


def expert_group(model: nn.Module, name: str) -> dist.ProcessGroup | None:
    """The ranks over which a parameter is sharded along its first dimension, or None: its module says so by `group`."""
    module_name, _, parameter_name = name.rpartition(".")
    owner = model.get_submodule(module_name)
    parameter = owner._parameters.get(parameter_name)
    return None if parameter is None or getattr(parameter, "allreduce", True) else getattr(owner, "group", None)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    # named_parameters lists a tied tensor once; state_dict knows which buffers are meant to be kept.
    kept = model.state_dict().keys()
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in named.items() if name in kept}
