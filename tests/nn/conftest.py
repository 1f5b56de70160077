import copy

import pytest
import torch
from torch import nn

import rtk


@pytest.fixture
def randomise():
    """Give batch norms statistics, scales and biases of both signs, as no fresh model has them."""

    def change(model):
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.normal_(module.running_mean, 0, 0.5)
                nn.init.uniform_(module.running_var, 0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.5)
        return model

    return change


@pytest.fixture
def compacted():
    """Compact a model and compare the two in float64, on `x`; return the model and its report."""

    def compact(model, x, **options):
        model = copy.deepcopy(model).double().eval()
        before = copy.deepcopy(model.state_dict())
        small, report = rtk.nn.compact(model, x.double(), report=True, **options)
        assert_equal_states(model.state_dict(), before)
        for images in (x, torch.rand_like(x)[..., :-1]):
            try:
                with torch.no_grad():
                    expected = model(images.double())
            except (RuntimeError, AssertionError):  # a head over height and width, one size only
                assert images is not x
                continue
            with torch.no_grad():
                actual = small(images.double())
            compare(actual, expected)
        return small, report

    return compact


def compare(actual, expected):
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        actual, expected = list(actual.values()), list(expected.values())
    if isinstance(expected, list | tuple):
        for a, b in zip(actual, expected, strict=True):
            compare(a, b)
        return
    scale = expected.abs().max().item()
    assert scale > 1e-6, "the outputs must say something"
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10 * scale)


def assert_equal_states(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
