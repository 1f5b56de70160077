import copy
import dataclasses

import pytest
import torch
import torchvision
from torch import nn

from rtk import Ticket
from rtk.errors import RtkError
from rtk.models import (
    ModelSpec,
    SegmentationNetwork,
    SegmentationSpec,
    create,
    read_spec,
    replace_head,
)
from rtk.models.segmentation import dilate
from rtk.train import Checkpoint, save_checkpoint

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


def spec(network="deeplabv3plus", stride=None, arch="resnet18", stem="3x3", **more):
    values = {"width": 0.125, "num_classes": 5, "mean": MEAN, "std": STD, **more}
    return SegmentationSpec(arch=arch, stem=stem, network=network, output_stride=stride, **values)


def build(*args, **values):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create(spec(*args, **values))


def pixels(*size, n=2):
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(1))


def with_statistics(model):
    """Batch norm that does something in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def test_fcn_is_torchvisions():
    model = build("fcn", 8, "resnet50", "7x7", width=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
    theirs = torchvision.models.segmentation.fcn_resnet50(
        weights=None, weights_backbone=None, num_classes=5, aux_loss=False
    )
    assert list(model.state_dict()) == list(theirs.state_dict())
    model.load_state_dict(with_statistics(theirs).state_dict())
    model.eval()
    x = pixels(41, 57, n=1)
    with torch.no_grad():
        assert torch.equal(model(x), theirs(x)["out"])


def test_deeplab_on_a_full_resnet50_has_the_published_shape():
    """CVL's: 2048 features at stride 16, a pyramid of 6, 12, 18, 256 and 48 channels."""
    with torch.device("meta"):
        model = create(spec(arch="resnet50", stem="7x7", width=1.0, num_classes=21))
    assert model.spec.output_stride == 16
    head = model.classifier
    pyramid = [conv[0] for conv in head.aspp.convs if isinstance(conv[0], nn.Conv2d)]
    assert [conv.dilation[0] for conv in pyramid] == [1, 6, 12, 18]
    assert [conv.in_channels for conv in pyramid] == [2048] * 4
    assert head.reduce[0].weight.shape == (48, 256, 1, 1)
    assert head.fuse[0].weight.shape == (256, 304, 3, 3)
    assert head.logits.weight.shape == (21, 256, 1, 1)
    assert head.aspp.project[-1].p == 0.1
    strides = [
        module.stride[0]
        for name, module in model.backbone.named_modules()
        if isinstance(module, nn.Conv2d) and name.endswith("downsample.0")
    ]
    assert strides == [1, 2, 2, 1]


def test_keys_are_the_backbones_and_the_heads():
    backbone = create(spec().backbone)
    keys = [f"backbone.{key}" for key in backbone.state_dict() if not key.startswith("fc.")]
    model = build()
    ours = list(model.state_dict())
    assert ours[: len(keys)] == keys
    parts = ("classifier.aspp.", "classifier.reduce.", "classifier.fuse.", "classifier.logits.")
    assert all(key.startswith(parts) for key in ours[len(keys) :])


@pytest.mark.parametrize("network", ["deeplabv3plus", "fcn"])
@pytest.mark.parametrize(
    ("arch", "stem", "stride"),
    [
        ("resnet18", "3x3", None),
        ("resnet18", "3x3", 2),
        ("resnet50", "3x3", 8),
        ("resnet18", "7x7", None),
        ("resnet50", "7x7", 8),
        ("resnet18", "7x7", 32),
    ],
)
def test_any_size_gives_every_pixel_logits(network, arch, stem, stride):
    model = build(network, stride, arch, stem)
    last = []
    model.backbone.layer4.register_forward_hook(lambda _, __, out: last.append(out.shape[-2:]))
    for height, width in ((32, 48), (33, 47), (5, 9)):
        logits = model(pixels(height, width))
        assert logits.shape == (2, 5, height, width)
        s = model.spec.output_stride
        assert last[-1] == (-(-height // s), -(-width // s))
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_stride_stands_for_the_last_layer_dilated():
    assert spec().output_stride == 4
    assert spec(stem="7x7").output_stride == 16
    assert spec("fcn", 4) == spec("fcn")


def features(network, x):
    x = network.maxpool(network.bn1(network.conv1(x), relu=True))
    return network.layer4(network.layer3(network.layer2(network.layer1(x))))


@pytest.mark.parametrize("factor", [1, 2, 4])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_dilated_features_are_the_pretrained_ones_and_more(arch, factor):
    plain = create(ModelSpec(arch, "3x3", 0.125, 5, MEAN, STD)).double()
    with_statistics(plain)
    dense = copy.deepcopy(plain)
    dilate(dense, factor)
    x = pixels(37, 50).double()
    with torch.no_grad():
        before, after = features(plain, x), features(dense, x)
    assert after.shape[-2:] == (-(-37 * factor // 8), -(-50 * factor // 8))
    assert (after[:, :, ::factor, ::factor] - before).abs().max() < 1e-10 * before.abs().max()


def test_images_are_normalised_inside():
    shifted = with_statistics(build())
    plain = with_statistics(build(mean=(0.0,) * 3, std=(1.0,) * 3))
    plain.load_state_dict(shifted.state_dict())
    x = pixels(16, 16)
    normalised = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        assert torch.equal(shifted(x), plain(normalised))
        assert torch.equal(shifted.forward_features(x), plain.forward_features(normalised))


def test_under_autocast_logits_are_resized_in_fp32():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert build()(pixels(16, 16)).dtype == torch.float32
    assert build().double()(pixels(16, 16).double()).dtype == torch.float64


def test_a_spec_comes_back_from_a_dict():
    ours = spec("fcn", 2)
    assert read_spec(ours.to_dict()) == ours
    plain = ours.backbone
    assert type(plain) is ModelSpec
    assert read_spec(plain.to_dict()) == plain
    assert (plain.arch, plain.width, plain.mean) == (ours.arch, ours.width, ours.mean)


def test_a_checkpoint_builds_the_network_with_its_masks_again(tmp_path):
    model = with_statistics(build("deeplabv3plus", 2))
    name = "backbone.layer2.0.conv1"
    mask = torch.rand(model.get_submodule(name).weight.shape) < 0.3
    Ticket({name: mask}).apply(model)
    save_checkpoint(tmp_path / "c.safetensors", model, None, {})
    checkpoint = Checkpoint.load(tmp_path / "c.safetensors")
    assert checkpoint.spec == model.spec
    again = checkpoint.build_model().eval()
    assert isinstance(again, SegmentationNetwork)
    assert torch.equal(again.get_submodule(name).mask, mask)
    x = pixels(19, 23)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"network": "unet"}, "unknown segmentation network 'unet'"),
        ({"stride": 16}, r"output_stride: expected 4, 2, 8 with the 3x3 stem, got 16"),
        ({"stem": "7x7", "stride": 4}, r"expected 16, 8, 32 with the 7x7 stem, got 4"),
        ({"arch": "torchvision:densenet121", "stem": "own"}, "needs a ResNet of rtk's own"),
        ({"num_classes": 0}, "num_classes"),
    ],
    ids=str,
)
def test_bad_specs_are_refused(change, words):
    with pytest.raises(RtkError, match=words):
        spec(**change)


def test_only_resnets_are_backbones():
    class Other(nn.Module):
        pass

    with pytest.raises(RtkError, match=r"needs a ResNet of rtk's own as its backbone, got Other"):
        SegmentationNetwork(spec(), Other())


def test_it_has_no_linear_head_to_replace():
    with pytest.raises(RtkError, match="expected a linear layer"):
        replace_head(build(), 3)


def test_a_ticket_of_another_network_is_refused():
    ticket = Ticket({}, meta={"model": dataclasses.asdict(spec(arch="resnet50"))})
    with pytest.raises(RtkError, match="ticket is for arch resnet50"):
        ticket.check_model(spec())
