"""compact on whole networks: rtk's and torchvision's."""

import pytest
import torch
import torchvision
from torch import nn

import rtk
from rtk.nn import BatchNormAct2d, MaskedConv2d, compact


def spec(arch, stem):
    return rtk.models.ModelSpec(arch, stem, 0.25, 10, (0.5, 0.4, 0.3), (0.2, 0.3, 0.2))


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("stem", ["3x3", "7x7"])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_channel_tickets(compacted, randomise, arch, stem, sparsity):
    model = randomise(rtk.models.create(spec(arch, stem)))
    rtk.draw.omp(model, sparsity, granularity="channel").apply(model)
    small, report = compacted(model, torch.rand(1, 3, 32, 40))
    assert report.left == {}
    assert report.parameters_left < 1 - 0.9 * sparsity
    assert report.flops_left < 1 - 0.3 * sparsity
    assert isinstance(small.bn1, BatchNormAct2d)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_the_inner_channels_of_a_block_go_to_the_last(compacted, randomise, arch):
    """Of a block's inner layers what is 0 after the ReLU goes, and all constants but one."""
    model = randomise(rtk.models.create(spec(arch, "3x3")))
    rtk.draw.omp(model, 0.5, granularity="channel", scope="layer").apply(model)
    small, _ = compacted(model, torch.rand(2, 3, 32, 32))
    modules = dict(model.named_modules())
    inner = ("conv1", "conv2") if arch == "resnet50" else ("conv1",)
    for name, conv in small.named_modules():
        if name.startswith("layer") and name.endswith(inner):
            assert conv.out_channels - int(modules[name].mask.sum()) in (0, 1), name


def test_the_first_convolution_too(compacted, randomise):
    model = randomise(rtk.models.create(spec("resnet18", "7x7")))
    rtk.draw.omp(model, 0.6, granularity="channel", include_first=True).apply(model)
    compacted(model, torch.rand(2, 3, 64, 64))


def test_fp32_and_widths_for_tensor_cores(randomise):
    model = randomise(rtk.models.create(spec("resnet18", "3x3"))).eval()
    rtk.draw.omp(model, 0.7, granularity="channel").apply(model)
    small = compact(model, multiple_of=8)
    widths = {m.out_channels for m in small.modules() if isinstance(m, nn.Conv2d)}
    assert {width % 8 for width in widths} == {0}
    x = torch.rand(4, 3, 32, 32)
    expected = model(x)
    assert (small(x) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "scope", "most"),
    [
        ("resnet18", "global", 0.9),
        ("vgg11_bn", "layer", 0.4),
        ("mobilenet_v2", "layer", 0.4),
        ("mobilenet_v3_small", "layer", 0.7),
        ("efficientnet_b0", "layer", 0.7),
        ("densenet121", "layer", 0.4),
        ("squeezenet1_1", "layer", 0.4),
        ("googlenet", "layer", 0.4),
        ("shufflenet_v2_x1_0", "layer", 0.6),
        ("resnext50_32x4d", "layer", 1.0),
        ("regnet_y_400mf", "layer", 1.0),
    ],
)
def test_torchvision(compacted, randomise, name, scope, most):
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model = randomise(torchvision.models.get_model(name, num_classes=10, **options))
    if name.startswith("vgg"):  # its classifier at full width would be most of the time
        model.avgpool = nn.AdaptiveAvgPool2d((2, 3))
        model.classifier = nn.Sequential(nn.Linear(512 * 6, 32), nn.ReLU(True), nn.Linear(32, 10))
    rtk.draw.omp(model, 0.5, granularity="channel", scope=scope).apply(model)
    _, report = compacted(model, torch.rand(1, 3, 48, 48))
    assert report.flops_left < most


def test_a_transformer_is_left_as_it_is(compacted):
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32
    )
    nn.init.normal_(model.heads.head.weight)
    _, report = compacted(model, torch.rand(2, 3, 32, 32))
    assert report.parameters_left == 1
    assert list(report.left) == ["reshape"]


def test_a_segmentation_network(compacted, randomise):
    model = torchvision.models.segmentation.fcn_resnet50(
        weights=None, weights_backbone=None, num_classes=4, aux_loss=True
    )
    randomise(model)
    for name, conv in list(model.named_modules()):
        if isinstance(conv, nn.Conv2d) and conv.out_channels > 4:
            parent, _, child = name.rpartition(".")
            mask = torch.rand(conv.out_channels, 1, 1, 1) < 0.5
            setattr(model.get_submodule(parent), child, MaskedConv2d.from_conv(conv, mask))
    _, report = compacted(model, torch.rand(1, 3, 33, 40))
    assert report.flops_left < 0.6
