"""What both masked layers keep through copies, moves and training."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rtk.errors import RtkError
from rtk.nn import MaskedConv2d, MaskedLinear


def boolean(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.4


LAYERS = {
    "conv": (lambda mask: MaskedConv2d(4, 6, 3, mask=mask), (2, 4, 6, 7), (6, 4, 3, 3)),
    "linear": (lambda mask: MaskedLinear(13, 9, mask=mask), (5, 13), (9, 13)),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def masked(name: str, mask: torch.Tensor | None = None):
    make, input_shape, weight_shape = LAYERS[name]
    return make(boolean(*weight_shape) if mask is None else mask), torch.randn(input_shape)


@each_layer
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize("kind", ["bool", "parameter"])
def test_copies(kind, duplicate, name):
    weight_shape = LAYERS[name][2]
    layer, x = masked(name, None if kind == "bool" else nn.Parameter(torch.rand(weight_shape)))
    other = duplicate(layer)
    assert torch.equal(other(x), layer(x))
    assert isinstance(other.mask, nn.Parameter) == (kind == "parameter")
    other.set_mask(~boolean(*weight_shape))
    other.bias.data += 1
    assert not torch.equal(other(x), layer(x)), "nothing is shared"
    assert layer.sparsity == LAYERS[name][0](layer.mask).sparsity


@each_layer
def test_torch_save_of_the_state(name):
    layer, x = masked(name)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other, _ = masked(name, torch.ones(1, dtype=torch.bool))
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x), layer(x))


@each_layer
def test_to_a_dtype_casts_floating_masks_only(name):
    layer, x = masked(name)
    wanted = layer(x)
    assert layer.double().mask.dtype == torch.bool
    torch.testing.assert_close(layer(x.double()).float(), wanted)
    layer.set_mask(layer.mask.double())
    assert layer.float().mask.dtype == torch.float32
    torch.testing.assert_close(layer(x), wanted)


@each_layer
def test_to_a_device(name, device):
    layer, x = masked(name)
    wanted = layer(x)
    layer.to(device)
    assert {t.device.type for t in layer.state_dict().values()} == {device}
    torch.testing.assert_close(layer(x.to(device)).cpu(), wanted, rtol=1e-4, atol=1e-5)
    layer.set_mask(torch.zeros(1, dtype=torch.bool))
    assert layer.mask.device.type == device


@each_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_fp32_master_serves_a_narrow_input(dtype, name):
    layer, x = masked(name)
    out = layer(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), layer(x), rtol=3e-2, atol=3e-2)
    out.float().square().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert not layer.weight.grad[~layer.mask].any()
    assert layer.weight.grad[layer.mask].all()


@each_layer
def test_autocast(name):
    layer, x = masked(name)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x), rtol=3e-2, atol=3e-2)
    out.float().square().sum().backward()
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32


@each_layer
@pytest.mark.parametrize("reduced", [False, True], ids=["element", "output"])
def test_a_parameter_mask_gets_the_gradient_of_the_formula(reduced, name):
    shape = LAYERS[name][2]
    mask_shape = (shape[0], *[1] * (len(shape) - 1)) if reduced else shape
    layer, x = masked(name, nn.Parameter(torch.randn(mask_shape)))
    formula = F.conv2d if name == "conv" else F.linear
    leaves = [t.detach().clone().requires_grad_() for t in (layer.weight, layer.mask, layer.bias)]
    formula(x, leaves[0] * leaves[1], leaves[2]).square().sum().backward()
    layer(x).square().sum().backward()
    for ours, theirs in zip((layer.weight, layer.mask, layer.bias), leaves, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=5e-4),
    "nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
}


@each_layer
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_pruned_weights_stay_zero_through_training(optimizer, name):
    layer, x = masked(name)
    plain = nn.Conv2d(4, 6, 3) if name == "conv" else nn.Linear(13, 9)
    layer.load_state_dict(plain.state_dict())  # what it holds at pruned places must go
    before = layer.weight.detach().clone()
    steps = OPTIMIZERS[optimizer](layer.parameters())
    for _ in range(50):
        steps.zero_grad()
        (layer(x + 0.1 * torch.randn_like(x)) - 1).square().mean().backward()
        steps.step()
    assert torch.equal(layer.weight == 0, ~layer.mask)
    assert (layer.weight != before)[layer.mask].all()


def test_linear_is_the_formula_and_folds():
    mask = boolean(9, 13)
    plain = nn.Linear(13, 9)
    x = torch.randn(2, 5, 13)
    wanted = F.linear(x, plain.weight * mask, plain.bias)
    layer = MaskedLinear.from_linear(plain, mask)
    assert layer.weight is plain.weight
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(layer(x[0, 0]), wanted[0, 0])
    assert list(layer.state_dict()) == ["weight", "bias", "mask"]
    assert layer.sparsity == pytest.approx(1 - mask.float().mean().item())
    folded = layer.fold()
    assert type(folded) is nn.Linear
    assert torch.equal(folded(x), wanted)
    state = nn.Linear(13, 9).state_dict()
    layer.load_state_dict(state)
    assert torch.equal(layer.weight, state["weight"] * mask)
    no_bias = MaskedLinear(13, 9, bias=False, mask=mask[:, :1])
    assert torch.equal(no_bias(x), F.linear(x, no_bias.weight * mask[:, :1]))


def test_linear_refuses_a_mask_that_does_not_fit():
    with pytest.raises(
        RtkError, match=r"MaskedLinear: mask must broadcast to \(N, K\) = \(9, 13\)"
    ):
        MaskedLinear(13, 9, mask=torch.ones(9, 12) > 0)
