"""torchvision's and timm's own files."""

import re

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from rtk.config import ConvertConfig
from rtk.convert import FORMATS
from rtk.convert.fit import find_arch
from rtk.errors import RtkError


def meta_state(name, **arguments):
    with torch.device("meta"):
        return torchvision.models.get_model(name, **arguments).state_dict()


def test_torchvisions_resnet(converted, pixels):
    network = torchvision.models.resnet18().eval()
    checkpoint = converted(network.state_dict(), "resnet18-5c106cde.pth")
    assert checkpoint.spec.arch == "resnet18" and checkpoint.spec.num_classes == 1000
    lineage = checkpoint.lineage
    assert (lineage["source"], lineage["pretrain"], lineage["robust"]) == (
        "imagenet",
        "natural",
        False,
    )
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (checkpoint.spec.mean, checkpoint.spec.std))
    with torch.no_grad():
        ours = checkpoint.build_model().eval()(pixels)
        assert torch.allclose(ours, network((pixels - mean) / std), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("resnet18", "resnet18"),
        ("resnet34", "torchvision:resnet34"),
        ("resnet50", "resnet50"),
        ("resnet101", "torchvision:resnet101"),
        ("resnet152", "torchvision:resnet152"),
        ("wide_resnet50_2", None),
        ("resnext50_32x4d", None),
        ("mobilenet_v2", None),
    ],
)
def test_resnets_are_told_by_their_blocks(name, arch):
    config = ConvertConfig(file="file.pth")
    if arch is None:
        with pytest.raises(RtkError, match="is no plain ResNet"):
            find_arch(meta_state(name), None, config)
        assert find_arch(meta_state(name), name, config) == f"torchvision:{name}"
    else:
        assert find_arch(meta_state(name), "robust", config) == arch


def test_another_family_by_name_in_safetensors(converted, pixels, tmp_path):
    network = torchvision.models.shufflenet_v2_x0_5(num_classes=7)
    save_file(network.state_dict(), tmp_path / "net.safetensors")
    checkpoint = converted(None, "net.safetensors", arch="shufflenet_v2_x0_5")
    assert checkpoint.spec.arch == "torchvision:shufflenet_v2_x0_5"
    state = checkpoint.build_model().state_dict()
    assert all(torch.equal(state[k], tensor) for k, tensor in network.state_dict().items())


def test_timm_brings_its_own_normaliser(converted, tmp_path):
    network = timm.create_model("mobilenetv3_small_050.lamb_in1k", num_classes=7)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    arch = "mobilenetv3_small_050.lamb_in1k"
    checkpoint = converted(None, "model.safetensors", arch=arch, format="timm")
    assert checkpoint.spec.arch == f"timm:{arch}"
    assert checkpoint.spec.mean == tuple(network.default_cfg["mean"])
    assert "timm's for this model" in checkpoint.meta["converted"]["notes"][-1]


def test_the_published_densenets_have_older_keys():
    new = meta_state("densenet121")
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12]\.)", r"\1.\2", key): new[key] for key in new
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    found = FORMATS.get("torchvision").read(old, ConvertConfig(file="densenet121-a639ec97.pth"))
    assert list(found.state) == list(new)


def test_auxiliary_classifiers_are_left_out(converted):
    network = torchvision.models.googlenet(num_classes=7, aux_logits=True, init_weights=False)
    checkpoint = converted(network.state_dict(), arch="googlenet")
    assert checkpoint.spec.mean == (0.5, 0.5, 0.5)  # transform_input, as the published weights need
    assert "the auxiliary classifiers are left out" in checkpoint.meta["converted"]["notes"]


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "compiled-and-parallel"])
def test_half_precision_and_wrappers(peer, converted, wrapped):
    state = {key: t.half() if t.is_floating_point() else t for key, t in peer.state.items()}
    if wrapped:
        state = {f"_orig_mod.module.{key}": tensor for key, tensor in state.items()}
    model = converted({"net": state}).build_model()
    assert model.fc.weight.dtype == torch.float32
    assert torch.equal(model.fc.weight, peer.state["fc.weight"].half().float())


def test_the_normaliser_can_be_told(peer, pixels, converted):
    checkpoint = converted(peer.state, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))
    assert torch.equal(
        checkpoint.build_model().eval()(pixels), peer.answer(pixels, (0.1, 0.2, 0.3), (1.0,) * 3)
    )


def test_every_key_that_does_not_fit_is_listed(peer, converted):
    state = peer.state
    state["layer5.weight"] = torch.ones(2)
    state["bn1.weight"] = torch.ones(3)
    absent = [key for key in state if key.startswith("layer4.1.bn2.")]
    for key in ("conv1.weight", "layer4.1.conv2.weight", "fc.weight", *absent):
        del state[key]
    with pytest.raises(RtkError) as error:
        converted(state, arch="torchvision:resnet18")
    text = str(error.value)
    assert "read as torchvision:resnet18, does not fit the model" in text
    missing, unexpected, misshapen = text.split("; ")[1:4]
    assert missing == "missing: " + ", ".join(
        sorted(["conv1.weight", "fc.weight", "layer4.1.conv2.weight", *absent])
    )
    assert unexpected == "unexpected: layer5.weight"
    assert "bn1.weight" in misshapen and "layer3.0.downsample.0.weight" in misshapen  # the width


def test_the_wrong_architecture(peer, converted):
    with pytest.raises(RtkError) as error:
        converted(peer.state, arch="resnet50")
    assert "missing: " in str(error.value)
    for layer in (1, 2, 3, 4):
        assert f"layer{layer}.0.conv3.weight" in str(error.value)


def test_a_network_that_nothing_tells(converted):
    state = torchvision.models.shufflenet_v2_x0_5().state_dict()
    with pytest.raises(RtkError, match=r"no plain ResNet .* conv1\.0\.weight.* --arch"):
        converted(state)
    assert converted({"state_dict": state, "arch": "shufflenet_v2_x0_5"}).spec.num_classes == 1000


def test_nan_is_refused(peer, converted):
    state = peer.state
    state["layer2.0.bn1.running_var"][1] = float("nan")
    with pytest.raises(RtkError, match=r"layer2\.0\.bn1\.running_var holds NaN"):
        converted(state)
