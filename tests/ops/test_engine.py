"""The engine off: PyTorch alone does the same work."""

import pytest
import torch
import torch.nn.functional as F

from rtk import models, ops
from rtk.attacks import PGD, GraphedAttack
from rtk.draw import omp
from rtk.nn import MaskedConv2d
from rtk.ops import engine
from rtk.ops._registry import is_forced
from rtk.train import make_step


def trained(steps=3):
    torch.manual_seed(0)
    spec = models.ModelSpec("resnet18", "3x3", 0.0625, 4, (0.5,) * 3, (0.25,) * 3)
    model = models.create(spec)
    omp(model, 0.8).apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)
    step = make_step(model, optimizer, PGD(norm="l2", eps=0.5, step_size=0.2, steps=2), amp=None)
    x, y = torch.rand(8, 3, 8, 8), torch.arange(8) % 4
    return model, [step(x, y).item() for _ in range(steps)]


def test_training_is_the_same_with_the_engine_off():
    with engine.off():
        plain, losses = trained()
    ours, expected = trained()
    assert losses == pytest.approx(expected, rel=1e-3)
    for (name, a), (_, b) in zip(plain.named_parameters(), ours.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=3e-4, msg=name)
    masked = [layer for layer in plain.modules() if isinstance(layer, MaskedConv2d)]
    assert masked
    for layer in masked:  # neither momentum nor weight decay revives what is pruned
        assert not layer.weight[~layer.mask].any() and layer.weight[layer.mask].any()


def test_a_masked_convolution_is_pytorchs_own(monkeypatch):
    layer = MaskedConv2d(3, 4, 3, padding=1, padding_mode="reflect")
    layer.set_mask(torch.rand(4, 3, 3, 3) > 0.5)
    x = torch.rand(2, 3, 6, 6)
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    expected = F.conv2d(padded, layer.weight * layer.mask, layer.bias)

    def never(*arguments):
        raise AssertionError("an op of the engine was called")

    monkeypatch.setattr(ops, "masked_conv2d", never)
    with engine.off():
        assert torch.equal(layer(x), expected)


def test_it_is_off_inside_only():
    assert engine.is_on() and not is_forced()
    with pytest.raises(ZeroDivisionError), engine.off():
        assert not engine.is_on() and is_forced()
        assert ops._registry.ops["topk_mask"].choose([torch.rand(4)], [2]).backend == "reference"
        raise ZeroDivisionError
    assert engine.is_on() and not is_forced()


@pytest.mark.gpu
def test_nothing_is_captured_or_fused():
    spec = models.ModelSpec("resnet18", "3x3", 0.25, 4, (0.5,) * 3, (0.25,) * 3)
    x, y = torch.rand(8, 3, 32, 32, device="cuda"), torch.arange(8, device="cuda") % 4
    x = x.contiguous(memory_format=torch.channels_last)

    def captured():
        model = models.create(spec).cuda().to(memory_format=torch.channels_last)
        omp(model, 0.8).apply(model)
        attack = PGD(steps=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        step = make_step(model, optimizer, attack)
        graphed = GraphedAttack(attack)
        for _ in range(6):
            step(x, y)
            graphed(model, x, y)
        return step.captured, graphed.captured

    assert captured() == (True, True)
    with engine.off():
        assert captured() == (False, False)
