"""torchvision's and timm's networks: theirs to the key, and everything of rtk works on them."""

import copy
import sys

import pytest
import timm
import torch
import torchvision
from torch import nn

import rtk
from rtk import draw, pretrain, transfer
from rtk.config import (
    DataConfig,
    DrawConfig,
    ModelConfig,
    PretrainConfig,
    TrainConfig,
    TransferConfig,
)
from rtk.errors import RtkError
from rtk.models import ModelSpec, create, replace_head, resolve_arch, resolve_stem
from rtk.train import Checkpoint, make_step

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
# Depthwise convolutions and squeeze-and-excite; grouped ones and channel shuffles; concatenations.
FAMILIES = [
    "torchvision:mobilenet_v3_small",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:densenet121",
]
TIMMS = ["timm:resnet10t", "timm:mobilenetv3_small_050", "timm:convnext_atto"]


def spec(arch, classes=5, **values):
    return ModelSpec(
        arch, **{"stem": "own", "width": 1.0, **values}, num_classes=classes, mean=MEAN, std=STD
    )


def plain(arch, classes=5):
    library, _, name = arch.partition(":")
    if library == "timm":
        return timm.create_model(name, num_classes=classes)
    return torchvision.models.get_model(name, num_classes=classes)


def pixels(n=2, side=32):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def normalised(x):
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@pytest.mark.parametrize("arch", [*FAMILIES, *TIMMS])
def test_it_is_the_librarys_network_with_the_normalisation_inside(arch):
    model = create(spec(arch)).eval()
    torch.manual_seed(0)
    theirs = plain(arch).eval()
    assert list(model.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in theirs.named_modules()]
    model.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        assert torch.equal(model(pixels()), theirs(normalised(pixels())))
    assert isinstance(model, type(theirs)) and isinstance(model, rtk.models.Classifier)
    assert model.spec == spec(arch)


@pytest.mark.parametrize("arch", [FAMILIES[0], FAMILIES[1], TIMMS[0], TIMMS[2]])
def test_features_are_what_the_head_reads(arch):
    model = create(spec(arch)).eval()
    with torch.no_grad():
        features = model.forward_features(pixels())
        head = model.get_submodule(model.head_name)
        assert features.shape == (2, head.in_features)
        assert torch.equal(head(features), model(pixels()))
    assert not head._forward_pre_hooks


def test_the_start_is_the_librarys_under_the_same_seed():
    torch.manual_seed(4)
    model = create(spec(FAMILIES[1]))
    torch.manual_seed(4)
    theirs = plain(FAMILIES[1]).state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())


def test_a_copy_is_equal_and_independent():
    model = create(spec(FAMILIES[1])).eval()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(pixels()), model(pixels()))
    assert twin.spec == model.spec and twin.head_name == "fc"
    with torch.no_grad():
        twin.fc.weight.zero_()
    assert float(model.fc.weight.detach().abs().sum()) > 0


def test_a_head_inside_a_sequence_is_replaced():
    model = create(spec(FAMILIES[0]))
    assert model.head_name == "classifier.3"
    replace_head(model, 9)
    assert model.classifier[3].out_features == 9 and model.spec.num_classes == 9
    assert model.eval()(pixels()).shape == (2, 9)


@pytest.mark.parametrize("arch", [*FAMILIES, TIMMS[0]])
def test_omp_lmp_and_finetuning(arch):
    model = create(spec(arch))
    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    x, y = pixels(4), torch.arange(4)

    ticket = draw.omp(model, 0.8)
    assert [*ticket.masks] == convolutions[1:]  # every one but the first, never the head
    pruned = sum(int((~mask).sum()) for mask in ticket.masks.values())
    assert pruned == round(0.8 * sum(mask.numel() for mask in ticket.masks.values()))
    channels = draw.omp(model, 0.5, "channel")
    assert channels.granularity == "channel" and 0.5 <= channels.sparsity < 0.51

    step = draw.make_lmp_step(copy.deepcopy(model), sparsity=0.5, amp=None)
    before = {name: mask.clone() for name, mask in step.masks.items()}
    step(x, y)
    learned = step.ticket()
    assert any(not torch.equal(mask, before[name]) for name, mask in learned.masks.items())
    for mask in learned.masks.values():
        assert int((~mask).sum()) == round(0.5 * mask.numel())

    ticket.apply(model).train()
    weights = {name: model.get_submodule(name).weight for name in ticket.masks}
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-2)
    tune = make_step(model, optimizer, rtk.attacks.PGD(steps=1), amp=None)
    for _ in range(2):
        assert torch.isfinite(tune(x, y))
    for name, mask in ticket.masks.items():
        assert not weights[name][~mask].any()
        if mask.any():  # a global ranking may leave nothing of a small layer
            assert not torch.equal(weights[name], start[name])


@pytest.mark.gpu
@pytest.mark.parametrize("arch", [*FAMILIES, "torchvision:efficientnet_b0", TIMMS[0]])
def test_whole_steps_are_captured_on_a_gpu(arch):
    x, y = pixels(8, side=64).cuda(), torch.arange(8).cuda() % 5
    model = create(spec(arch)).cuda().to(memory_format=torch.channels_last)
    lmp = draw.make_lmp_step(copy.deepcopy(model), sparsity=0.5, graph=True)
    draw.omp(model, 0.5).apply(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    tune = make_step(model, optimizer, rtk.attacks.PGD(steps=2), graph=True)
    for step in (lmp, tune):
        losses = [float(step(x, y)) for _ in range(6)]
        assert step.captured and all(loss == loss for loss in losses)
        assert losses[-1] != losses[-2]  # a replay learns


def test_a_ticket_fits_the_plain_network_too_and_no_other():
    model = create(spec(FAMILIES[1]))
    ticket = draw.omp(model, 0.5)
    theirs = ticket.apply(plain(FAMILIES[1]))
    assert theirs.get_submodule("conv5.0").sparsity > 0
    with pytest.raises(RtkError, match="ticket is for arch torchvision:shufflenet_v2_x0_5"):
        ticket.apply(create(spec("torchvision:mobilenet_v3_small")))


def test_the_whole_road(tmp_path):
    machine = {"device": "cpu", "threads": 1}
    train = TrainConfig(epochs=1, batch_size=96)
    pretrain.run(
        PretrainConfig(
            out=f"{tmp_path}/net",
            data=DataConfig("digits[0-1]"),
            model=ModelConfig("shufflenet_v2_x0_5"),
            train=train,
            **machine,
        )
    )
    checkpoint = Checkpoint.load(tmp_path / "net")
    assert checkpoint.lineage["arch"] == "torchvision:shufflenet_v2_x0_5"
    assert (checkpoint.spec.stem, checkpoint.spec.width) == ("own", 1.0)
    draw.run(DrawConfig(out=f"{tmp_path}/ticket", checkpoint=f"{tmp_path}/net", **machine))
    transfer.run(
        TransferConfig(
            out=f"{tmp_path}/tuned",
            checkpoint=f"{tmp_path}/net",
            ticket=f"{tmp_path}/ticket",
            mode="linear_frozen",
            data=DataConfig("digits[2-4]"),
            train=train,
            **machine,
        )
    )
    tuned = Checkpoint.load(tmp_path / "tuned").build_model()
    assert tuned.fc.out_features == 3
    assert rtk.Ticket.from_model(tuned).sparsity == pytest.approx(0.8, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", "resnet18"),
        ("resnet34", "torchvision:resnet34"),
        ("densenet121", "torchvision:densenet121"),  # timm has it too
        ("torchvision:resnet18", "torchvision:resnet18"),
        ("resnet10t", "timm:resnet10t"),
        ("timm:resnet18.a1_in1k", "timm:resnet18.a1_in1k"),
    ],
)
def test_resolve_arch(name, expected):
    assert resolve_arch(name) == expected


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet19", "unknown model 'resnet19': expected one of resnet18, resnet50, a model of"),
        ("torchvision:densenet122", "torchvision has no model 'densenet122'; did you mean"),
        ("timm:resnet10x", "timm has no model 'resnet10x'; did you mean"),
        ("jax:resnet18", "unknown model 'jax:resnet18'"),
        ("", "unknown model ''"),
    ],
)
def test_unknown_names(name, words):
    with pytest.raises(RtkError) as error:
        resolve_arch(name)
    assert words in str(error.value)


def test_without_timm_its_names_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RtkError, match=r"need timm, .* pip install 'rtk\[timm\]'"):
        resolve_arch("timm:resnet10t")
    with pytest.raises(RtkError, match=r"unknown model 'resnet10t'.* timm:NAME"):
        resolve_arch("resnet10t")
    assert resolve_arch("densenet121") == "torchvision:densenet121"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"arch": FAMILIES[1], "width": 0.5}, "width: expected 1 for torchvision:shufflenet"),
        ({"arch": FAMILIES[1], "stem": "3x3"}, "stem: expected auto for torchvision:shufflenet"),
        ({"arch": "resnet18", "stem": "own"}, "stem: expected 3x3 or 7x7 for resnet18"),
        ({"arch": "squeezenet1_1"}, "does not end in one linear layer"),
        ({"arch": "timm:levit_128s"}, "does not end in one linear layer"),
        ({"arch": "timm:fastvit_t8"}, "does more in its forward than features and a head"),
    ],
    ids=["width", "stem", "own", "convolution", "two-heads", "forward"],
)
def test_what_a_network_cannot_be(values, words):
    with pytest.raises(RtkError) as error:
        create(spec(**values))
    assert words in str(error.value)


def test_a_librarys_stem_is_its_own_at_every_size():
    for size in (8, 224):
        assert resolve_stem("auto", size, FAMILIES[0]) == "own"
    with pytest.raises(RtkError, match="whose stem is its own, got '7x7'"):
        resolve_stem("7x7", 224, FAMILIES[0])
    with pytest.raises(RtkError, match="expected 3x3 or 7x7 for resnet18"):
        resolve_stem("own", 224, "resnet18")
