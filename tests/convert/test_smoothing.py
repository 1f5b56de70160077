"""locuslab/smoothing: Sequential(NormalizeLayer, network)."""

import pytest
import torch
from torch import nn


@pytest.mark.parametrize("parallel", [True, False], ids=["imagenet", "cifar"])
def test_the_network_behind_the_normaliser(peer, pixels, converted, parallel):
    network = nn.DataParallel(peer.network) if parallel else peer.network
    state = nn.Sequential(nn.Identity(), network).state_dict()
    peer.network.cpu()  # nn.DataParallel takes it to a GPU, where there is one
    assert all(key.startswith("1.module." if parallel else "1.") for key in state)
    content = {"epoch": 90, "arch": "resnet18", "state_dict": state, "optimizer": {}}
    checkpoint = converted(content, "noise_0.50/checkpoint.pth.tar")
    assert checkpoint.meta["converted"]["format"] == "smoothing"
    assert checkpoint.lineage["pretrain"] == "smoothing-0.5" and checkpoint.lineage["robust"]
    assert torch.equal(checkpoint.build_model().eval()(pixels), peer.answer(pixels))


def test_a_normaliser_that_is_in_the_file(peer, converted):
    layer = nn.Module()
    layer.register_buffer("means", torch.tensor([0.1, 0.2, 0.3]))
    layer.register_buffer("sds", torch.tensor([0.4, 0.5, 0.6]))
    checkpoint = converted({"state_dict": nn.Sequential(layer, peer.network).state_dict()})
    assert checkpoint.spec.mean == (0.1, 0.2, 0.3) and checkpoint.spec.std == (0.4, 0.5, 0.6)
