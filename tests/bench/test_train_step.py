"""What the bench times is the same step in all: a peer whose gradients are others is refused."""

import pytest
import torch

from moe.model import MoEDecoder
from tests.bench import train_step


@pytest.mark.parametrize("name", list(train_step.PEERS))
def test_a_peer_passes_only_with_our_weights(name: str) -> None:
    torch.manual_seed(0)
    ours = MoEDecoder(train_step.TINY, vocab_size=train_step.VOCAB)
    try:
        theirs = train_step.build_peer(name, train_step.TINY)
    except ImportError as error:
        pytest.skip(f"{error}: make bench-peers")
    train_step.share_weights(name, ours, theirs)
    before = {key: value.clone() for key, value in theirs.state_dict().items()}
    train_step.check(name, ours, theirs)
    assert all(torch.equal(value, before[key]) for key, value in theirs.state_dict().items()), "gradients swapped back"
    assert all(parameter.grad is None for parameter in ours.parameters())
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 3:  # experts: their gradients change, the loss by less than its tolerance
                parameter.mul_(1.2)
    with pytest.raises(AssertionError, match="a gradient by"):
        train_step.check(name, ours, theirs)
