"""torch.nn.utils.prune's files, as CV_LTH_Pre-training and Double-Win-LTH write them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from rtk.errors import RtkError

from .conftest import STD, Peer


def pruned(network, *, amount=0.7, first=False, head=False):
    network = copy.deepcopy(network)
    layers = [m for n, m in network.named_modules() if isinstance(m, nn.Conv2d)]
    layers = layers if first else layers[1:]
    layers += [network.fc] if head else []
    prune.global_unstructured(
        [(m, "weight") for m in layers], pruning_method=prune.L1Unstructured, amount=amount
    )
    return network


@pytest.mark.parametrize("first", [False, True], ids=["CVL", "DW"])
@pytest.mark.parametrize("parallel", [False, True], ids=["plain", "DataParallel"])
def test_dense_weights_and_the_ticket(peer, pixels, converted, ticket, first, parallel):
    network = pruned(peer.network, first=first)
    state = (nn.DataParallel(network) if parallel else network).state_dict()
    network.cpu()  # nn.DataParallel takes it to a GPU, where there is one
    checkpoint = converted({"state_dict": state, "arch": "resnet18", "best_acc1": 1.0})
    dense = checkpoint.build_model().eval()
    assert torch.equal(dense(pixels), peer.answer(pixels))

    found = ticket()
    assert (found.meta["include_first"], "conv1" in found.masks) == (first, first)
    for name, mask in found.masks.items():
        assert torch.equal(mask, network.get_submodule(name).weight_mask.bool())
    assert found.sparsity == pytest.approx(0.7, abs=1e-4) and found.granularity == "element"
    assert found.meta["source_sha256"] == checkpoint.sha256
    peer.network = network  # its forward multiplies by the masks
    assert torch.equal(found.apply(dense)(pixels), peer.answer(pixels))


def test_a_normaliser_of_advertorch(peer, pixels, converted):
    state = pruned(peer.network).state_dict()
    mean = torch.tensor([0.1, 0.2, 0.3])
    state |= {"normalize.mean": mean, "normalize.std": torch.tensor(STD)}
    checkpoint = converted({"state_dict": state})
    assert checkpoint.spec.mean == (0.1, 0.2, 0.3) and checkpoint.spec.std == STD


def test_masks_of_the_head_and_of_a_bias_are_applied(peer, pixels, converted, ticket):
    network = pruned(peer.network, head=True)
    prune.random_unstructured(network.fc, "bias", amount=3)
    checkpoint = converted({"state_dict": network.state_dict()})
    model = checkpoint.build_model().eval()
    assert "fc" not in ticket().masks
    assert torch.equal(model.fc.weight, network.fc.weight)
    assert torch.equal(model.fc.bias, network.fc.bias) and int((model.fc.bias == 0).sum()) == 3
    notes = " ".join(checkpoint.meta["converted"]["notes"])
    assert "mask of fc, the head, is applied" in notes and "mask of fc.bias is applied" in notes


def test_a_structured_mask_is_recognised(peer, converted, ticket):
    network = copy.deepcopy(peer.network)
    for block in network.layer2:
        prune.ln_structured(block.conv1, "weight", amount=0.5, n=1, dim=0)
    converted({"state_dict": network.state_dict()})
    assert ticket().granularity == "channel" and set(ticket().masks) == {
        "layer2.0.conv1",
        "layer2.1.conv1",
    }


def test_a_mask_without_its_weight_is_refused(peer, converted):
    state = pruned(peer.network).state_dict()
    del state["layer1.0.conv1.weight_mask"], state["layer4.1.conv2.weight_orig"]
    with pytest.raises(RtkError) as error:
        converted({"state_dict": state})
    assert "layer1.0.conv1.weight, layer4.1.conv2.weight" in str(error.value)


def test_a_32_pixel_network_and_its_usual_normaliser(pixels, converted):
    peer = Peer(stem="3x3", classes=10)
    checkpoint = converted({"state_dict": pruned(peer.network).state_dict()})
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.201)
    assert checkpoint.spec.stem == "3x3" and checkpoint.spec.mean == mean
    model = checkpoint.build_model().eval()
    assert torch.equal(model(pixels), peer.answer(pixels, mean, std))
    assert "CIFAR-10's, as the stem is 3x3" in checkpoint.meta["converted"]["notes"][-1]
