"""BatchNormAct2d is nn.BatchNorm2d, and what it adds is an addition and a ReLU."""

import pytest
import torch
from torch import nn

from rtk.nn import BatchNormAct2d

OPTIONS = [
    {},
    {"momentum": None},
    {"momentum": 0.3, "eps": 1e-3},
    {"affine": False},
    {"track_running_stats": False},
]


def pair(options):
    ours, theirs = BatchNormAct2d(6, **options), nn.BatchNorm2d(6, **options)
    if theirs.affine:
        nn.init.normal_(theirs.weight)
        nn.init.normal_(theirs.bias)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_is_batch_norm_bit_for_bit(options, add, relu):
    ours, theirs = pair(options)
    for training in (True, True, False, True):
        ours.train(training), theirs.train(training)
        x, residual = torch.randn(3, 6, 5, 4), torch.randn(3, 6, 5, 4) if add else None
        mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        out = ours(mine, residual, relu=relu)
        expected = theirs(other)
        expected = expected if residual is None else expected + residual
        expected = expected.relu() if relu else expected
        assert torch.equal(out, expected)
        out.square().sum().backward()
        expected.square().sum().backward()
        assert torch.equal(mine.grad, other.grad)
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            assert torch.equal(a, b)


def test_one_value_a_channel_is_refused_as_by_batch_norm():
    with pytest.raises(ValueError, match="more than 1 value per channel when training"):
        BatchNormAct2d(6)(torch.randn(1, 6, 1, 1))
    assert BatchNormAct2d(6).eval()(torch.randn(1, 6, 1, 1)).shape == (1, 6, 1, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_autocast_on_a_gpu(options):
    conv = nn.Conv2d(8, 8, 3, padding=1).to("cuda", memory_format=torch.channels_last)
    ours, theirs = BatchNormAct2d(8, **options).cuda(), nn.BatchNorm2d(8, **options).cuda()
    x = torch.randn(16, 8, 12, 12, device="cuda").to(memory_format=torch.channels_last)
    for training in (True, True, False):
        ours.train(training), theirs.train(training)
        with torch.autocast("cuda", torch.bfloat16):
            z = conv(x)
            out, expected = ours(z, z, relu=True), (theirs(z) + z).relu()
        assert out.dtype == torch.bfloat16
        assert out.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(out, expected, rtol=0.02, atol=0.03)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
