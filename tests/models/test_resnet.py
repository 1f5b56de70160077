import copy
import dataclasses

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.functional import cross_entropy

from rtk.errors import RtkError
from rtk.models import MODELS, ModelSpec, create
from rtk.models.resnet import scaled

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


def spec(arch="resnet18", stem="3x3", width=0.125, num_classes=10, mean=MEAN, std=STD):
    return ModelSpec(arch, stem, width, num_classes, mean, std)


def build(seed=0, **values):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return create(spec(**values))


def pixels(n=2, side=32):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_7x7_at_width_1_is_torchvisions_network(arch):
    model = build(arch=arch, stem="7x7", width=1.0, num_classes=1000)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = getattr(torchvision.models, arch)()
    ours, other = model.state_dict(), theirs.state_dict()
    assert list(ours) == list(other)  # keys and order
    assert all(torch.equal(ours[k], other[k]) for k in ours)  # the same start under the same seed
    with torch.random.fork_rng():
        torch.manual_seed(7)
        theirs = getattr(torchvision.models, arch)()
    model.load_state_dict(theirs.state_dict())
    model.eval(), theirs.eval()
    x = pixels(side=64)
    normalised = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        assert torch.equal(model(x), theirs(normalised))


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_in_training_it_is_torchvisions_network_bit_for_bit(arch):
    model = build(arch=arch, stem="7x7", width=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
    theirs = getattr(torchvision.models, arch)(num_classes=10)
    theirs.load_state_dict(model.state_dict())
    x, y = pixels(4, side=64), torch.arange(4)
    for network in (model, theirs):
        cross_entropy(network.train()(x), y).backward()
    for ours, other in zip(model.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(ours.grad, other.grad)
    ours, other = model.state_dict(), theirs.state_dict()
    assert all(torch.equal(ours[k], other[k]) for k in ours)  # the running statistics


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_3x3_stem_differs_from_torchvision_in_the_stem_only(arch):
    ours = build(arch=arch, width=1.0).state_dict()
    theirs = getattr(torchvision.models, arch)(num_classes=10).state_dict()
    assert list(ours) == list(theirs)
    differ = [k for k in ours if ours[k].shape != theirs[k].shape]
    assert differ == ["conv1.weight"]
    assert ours["conv1.weight"].shape == (64, 3, 3, 3)


@pytest.mark.parametrize(
    ("stem", "side", "sides"),
    [("3x3", 32, [32, 32, 16, 8, 4]), ("7x7", 64, [32, 16, 8, 4, 2]), ("3x3", 8, [8, 8, 4, 2, 1])],
)
def test_stem_decides_the_resolution(stem, side, sides):
    model = build(stem=stem).eval()
    seen = []
    for module in (model.conv1, model.layer1, model.layer2, model.layer3, model.layer4):
        module.register_forward_hook(lambda m, i, output: seen.append(output.shape[2]))
    model(pixels(side=side))
    assert seen == sides


@pytest.mark.parametrize(
    ("channels", "width", "expected"),
    [(64, 1.0, 64), (64, 0.25, 16), (64, 0.3, 16), (64, 0.32, 24), (64, 0.01, 8), (512, 1.5, 768)],
)
def test_widths_are_multiples_of_8(channels, width, expected):
    assert scaled(channels, width) == expected


@pytest.mark.parametrize(
    ("arch", "features"), [("resnet18", 128), ("resnet50", 512)], ids=["basic", "bottleneck"]
)
def test_width_scales_every_layer(arch, features):
    model = build(arch=arch, width=0.25)
    assert model.conv1.out_channels == 16
    assert model.fc.in_features == features
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.out_channels % 8 == 0 for m in convs)
    if arch == "resnet50":
        assert model.layer1[0].conv1.weight.shape == (16, 16, 1, 1)
        assert model.layer1[0].conv3.weight.shape == (64, 16, 1, 1)
    assert model.eval()(pixels()).shape == (2, 10)


def test_convolutions_start_kaiming_fan_out_and_no_batch_norm_starts_at_zero():
    model = build(width=1.0)
    weight = model.layer3[0].conv2.weight
    assert float(weight.detach().std()) == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()


def test_forward_is_the_head_on_pooled_features():
    model = build().eval()
    features = model.forward_features(pixels())
    assert features.shape == (2, 64)
    assert torch.equal(model(pixels()), model.fc(features))
    assert (features >= 0).all()
    assert model.head_name == "fc" and model.spec == spec()


def test_normalisation_is_inside_and_not_in_the_state_dict():
    model, plain = build().eval(), build(mean=(0.0,) * 3, std=(1.0,) * 3).eval()
    assert not {"mean", "std"} & set(model.state_dict())
    assert torch.equal(model.mean.flatten(), torch.tensor(MEAN))
    x = pixels()
    normalised = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert torch.equal(model(x), plain(normalised))


def test_gradient_reaches_the_pixels_and_every_weight():
    model = build().train()
    x = pixels().requires_grad_()
    cross_entropy(model(x), torch.tensor([0, 1])).backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_bf16_autocast_and_channels_last():
    model = build().eval()
    x = pixels()
    with torch.no_grad():
        expected = model(x)
        last = model.to(memory_format=torch.channels_last)
        z = x.to(memory_format=torch.channels_last)
        assert torch.allclose(last(z), expected, atol=1e-5)
        assert last.layer1(last.conv1(last.normalise(z))).is_contiguous(
            memory_format=torch.channels_last
        )
        with torch.autocast("cpu", torch.bfloat16):
            low = last(z)
    assert low.dtype == torch.bfloat16
    assert torch.allclose(low.float(), expected, atol=0.05 * float(expected.abs().max()))


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_compiles_without_graph_breaks(arch):
    model = build(arch=arch).eval()
    # aot_eager traces forward in full but needs no C++ compiler.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(pixels()), model(pixels()), atol=1e-5)


def test_deepcopy_is_equal_and_independent():
    model = build().eval()
    twin = copy.deepcopy(model)
    assert twin.spec == model.spec
    assert torch.equal(twin(pixels()), model(pixels()))
    with torch.no_grad():
        twin.fc.weight.zero_()
    assert float(model.fc.weight.detach().abs().sum()) > 0


def test_unknown_architecture_names_the_nearest():
    with pytest.raises(RtkError, match=r"unknown model 'resnet81'.*did you mean 'resnet18'"):
        create(spec(arch="resnet81"))
    assert MODELS.names() == ["resnet18", "resnet50"]


def test_a_width_that_leaves_nothing_is_refused():
    with pytest.raises(RtkError, match=r"width 0\.01 is so small .* at least 0\.015625"):
        build(width=0.01)
    assert build(width=0.015625).layer4[1].conv2.out_channels == 8


def test_spec_of_a_model_builds_it_again():
    model = build(width=0.25, stem="7x7")
    again = create(ModelSpec.from_dict(dataclasses.asdict(model.spec)))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(pixels()), model.eval()(pixels()))
