"""hidden-networks and Robust-Scratch-Ticket: frozen weights, scores, a 1x1 convolution as head."""

import pytest
import torch
from torch import nn

from rtk.errors import RtkError

from .conftest import Peer, prefixed


def get_subnet(scores, k):
    """Their GetSubnet: 1 for the share `k` with the largest scores."""
    out = scores.clone()
    _, idx = scores.flatten().sort()
    j = int((1 - k) * scores.numel())
    flat = out.flatten()
    flat[idx[:j]] = 0
    flat[idx[j:]] = 1
    return flat.reshape(scores.shape)


def their_file(peer, dims=4, affine=False, head_scores=True):
    """Their state_dict: scores beside weights (of one value a filter for `dims` 1, ...)."""
    state = peer.state
    if not affine:
        for name, module in peer.network.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                del state[f"{name}.weight"], state[f"{name}.bias"]
    state["fc.weight"] = state["fc.weight"][..., None, None]
    del state["fc.bias"]
    for name, module in peer.network.named_modules():
        if isinstance(module, nn.Conv2d) or (name == "fc" and head_scores):
            weight = state[f"{name}.weight"]
            state[f"{name}.scores"] = torch.randn(weight.shape[:dims])
    return {"arch": "ResNet18", "state_dict": prefixed("module.", state), "best_acc1": 0.0}


@pytest.mark.parametrize(
    ("dims", "granularity"), [(4, "element"), (3, "row"), (2, "kernel"), (1, "channel")]
)
def test_the_best_scores_are_the_ticket(pixels, converted, ticket, dims, granularity):
    peer = Peer(classes=8)  # even, as they round otherwise: half of every layer is half
    content = their_file(peer, dims)
    state = content["state_dict"]
    checkpoint = converted(content, sparsity=0.5)
    found = ticket()
    assert found.granularity == granularity and found.meta["scheme"] == "hidden-networks"
    for name, mask in found.masks.items():
        theirs = get_subnet(state[f"module.{name}.scores"].abs(), 0.5)
        assert torch.equal(mask.reshape(theirs.shape), theirs.bool())

    # The network that they run: weights times masks, the head's too, and no bias.
    for name, module in peer.network.named_modules():
        if f"module.{name}.scores" in state:
            mask = get_subnet(state[f"module.{name}.scores"].abs(), 0.5)
            mask = mask.reshape(mask.shape + (1,) * (4 - mask.dim()))
            mask = mask.flatten(1) if name == "fc" else mask
            module.weight.data.mul_(mask)
    peer.network.fc.bias.data.zero_()
    model = found.apply(checkpoint.build_model()).eval()
    assert torch.allclose(model(pixels), peer.answer(pixels), atol=1e-6)


def test_the_first_layer_and_a_dense_head(peer, converted, ticket):
    content = their_file(peer, head_scores=False)
    checkpoint = converted(content, sparsity=0.9)
    assert "conv1" in ticket().masks and ticket().meta["include_first"]
    model = checkpoint.build_model()
    assert torch.equal(model.fc.weight, peer.network.fc.weight) and not model.fc.bias.any()
    for mask in ticket().masks.values():
        assert int((~mask).sum()) == round(0.9 * mask.numel())


def test_what_the_file_lacks_is_said(peer, converted, tmp_path):
    checkpoint = converted(their_file(peer))
    notes = " ".join(checkpoint.meta["converted"]["notes"])
    for text in (
        "--sparsity S makes a ticket",
        "fc.weight, a 1x1 convolution there, is a linear layer",
        "fc.bias is 0",
        "batch norm scales by 1",
    ):
        assert text in notes
    assert not (tmp_path / "converted" / "ticket.safetensors").exists()


def test_scores_of_0_and_1_are_a_mask(peer, converted, ticket):
    """RST's FixedSubnetConv keeps the mask itself as scores."""
    content = their_file(peer)
    for key, scores in content["state_dict"].items():
        if key.endswith(".scores"):
            scores.copy_(get_subnet(scores.abs(), 0.3))
    converted(content)
    for name, mask in ticket().masks.items():
        assert torch.equal(mask, content["state_dict"][f"module.{name}.scores"] == 1)


def test_a_cifar_network_of_theirs(pixels, converted):
    """`shortcut` for downsample, cResNet18 for its name, affine batch norm."""
    peer = Peer(stem="3x3", classes=10)
    content = their_file(peer, affine=True)
    content["state_dict"] = {
        key.replace(".downsample.", ".shortcut."): tensor
        for key, tensor in content["state_dict"].items()
    }
    checkpoint = converted(content | {"arch": "cResNet18"})
    assert checkpoint.spec.arch == "resnet18" and checkpoint.spec.stem == "3x3"
    theirs, ours = peer.state, checkpoint.build_model().state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if key != "fc.bias")


def test_scores_that_do_not_fit_are_refused(peer, converted):
    content = their_file(peer)
    content["state_dict"]["module.conv1.scores"] = torch.ones(3, 3)
    with pytest.raises(RtkError, match=r"the scores of 'conv1' are \(3, 3\), beside a weight"):
        converted(content)
