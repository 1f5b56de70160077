"""masked_conv2d against F.conv2d(x, w * m) in float64, on every backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rtk.errors import RtkError
from rtk.ops import backend as forced
from rtk.ops import masked_conv2d

OP = "masked_conv2d"

# input (N, C, H, W) or (C, H, W); weight (K, C / groups, R, S); F.conv2d's arguments
CONVOLUTIONS = {
    "3x3": ((2, 5, 7, 9), (6, 5, 3, 3), {}),
    "1x1": ((2, 5, 7, 9), (6, 5, 1, 1), {}),
    "stride": ((2, 3, 8, 9), (4, 3, 3, 3), {"stride": (2, 3)}),
    "dilation": ((2, 3, 9, 11), (4, 3, 3, 3), {"dilation": (1, 2)}),
    "padding-pair": ((2, 3, 6, 5), (4, 3, 3, 3), {"padding": (2, 1)}),
    "all-at-once": (
        (2, 4, 11, 9),
        (6, 2, 3, 5),
        {"stride": 2, "padding": 3, "dilation": (2, 1), "groups": 2},
    ),
    "groups": ((2, 6, 5, 5), (4, 3, 3, 3), {"groups": 2}),
    "depthwise": ((2, 4, 6, 6), (8, 1, 3, 3), {"groups": 4, "padding": 1}),
    "valid": ((2, 3, 6, 7), (4, 3, 3, 3), {"padding": "valid"}),
    "same-odd": ((2, 3, 6, 7), (4, 3, 3, 5), {"padding": "same"}),
    "same-even": ((2, 3, 6, 7), (4, 3, 2, 4), {"padding": "same"}),
    "same-odd-and-even": ((2, 3, 6, 7), (4, 3, 3, 2), {"padding": "same"}),
    "same-even-dilated": ((2, 3, 8, 9), (4, 3, 2, 4), {"padding": "same", "dilation": (3, 1)}),
    "unbatched": ((3, 6, 7), (4, 3, 3, 3), {"padding": 1}),
    "unbatched-same-even": ((3, 6, 7), (4, 3, 2, 2), {"padding": "same"}),
    "no-images": ((0, 3, 6, 7), (4, 3, 3, 3), {"padding": 1}),
}
MASKS = {
    "element": lambda k, c, r, s: torch.rand(k, c, r, s) < 0.4,
    "row": lambda k, c, r, s: torch.rand(k, c, r, 1) < 0.5,
    "kernel": lambda k, c, r, s: torch.rand(k, c, 1, 1) < 0.5,
    "channel": lambda k, c, r, s: torch.rand(k, 1, 1, 1) < 0.5,
    "columns-only": lambda k, c, r, s: torch.arange(s) % 2 == 0,
    "input-channel": lambda k, c, r, s: torch.rand(c, 1, 1) < 0.5,
    "one-number": lambda k, c, r, s: torch.tensor(True),
    "all-zero": lambda k, c, r, s: torch.zeros(k, c, r, s, dtype=torch.bool),
    "all-one": lambda k, c, r, s: torch.ones(k, c, r, s, dtype=torch.bool),
    "expanded": lambda k, c, r, s: (torch.rand(k, 1, 1, 1) < 0.5).expand(k, c, r, s),
}
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels-last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "every-second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
}


def tensors(name: str, device: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return input, weight, an element mask and a bias for one of the convolutions."""
    input_shape, weight_shape, _ = CONVOLUTIONS[name]
    return {
        "input": torch.randn(input_shape).to(device, dtype),
        "weight": torch.randn(weight_shape).to(device, dtype),
        "mask": MASKS["element"](*weight_shape).to(device),
        "bias": torch.randn(weight_shape[0]).to(device, dtype),
    }


def formula(input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, **conv) -> Tensor:
    return F.conv2d(input, weight * mask, bias, **conv)


def run(assert_like_formula, conv: dict, **named: Tensor | None) -> None:
    assert_like_formula(
        lambda *args: masked_conv2d(*args, **conv), lambda *args: formula(*args, **conv), **named
    )


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # the formula's
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_convolution(name, backend, device, assert_like_formula):
    run(assert_like_formula, CONVOLUTIONS[name][2], **tensors(name, device))


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["bool", "float"])
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask(mask, dtype, backend, device, assert_like_formula):
    given = tensors("3x3", device)
    given["mask"] = MASKS[mask](6, 5, 3, 3).to(device)
    if dtype:
        given["mask"] = given["mask"].to(dtype) * torch.randn(given["mask"].shape, device=device)
    run(assert_like_formula, {"padding": 1}, **given)


@pytest.mark.parametrize(
    ("input", "weight", "mask"),
    [
        (torch.float64, torch.float64, torch.float64),
        (torch.float32, torch.float32, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.bool),
        (torch.float16, torch.float32, torch.bool),
        (torch.float16, torch.float16, torch.float32),
    ],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_every_dtype(input, weight, mask, backend, device, assert_like_formula):
    given = tensors("3x3", device, weight)
    given["input"] = given["input"].to(input)
    given["mask"] = given["mask"].to(mask)
    out = masked_conv2d(**given)
    assert out.dtype == input
    run(assert_like_formula, {}, **given)


@pytest.mark.parametrize("weight", LAYOUTS)
@pytest.mark.parametrize("input", LAYOUTS)
def test_every_layout(input, weight, backend, device, assert_like_formula):
    given = tensors("groups", device)
    given["input"] = LAYOUTS[input](given["input"])
    given["weight"] = LAYOUTS[weight](given["weight"])
    given["mask"] = LAYOUTS[weight](given["mask"])
    run(assert_like_formula, {"groups": 2}, **given)


@pytest.mark.parametrize("weight", LAYOUTS)
@pytest.mark.parametrize("input", LAYOUTS)
@pytest.mark.parametrize("name", ["groups", "depthwise", "1x1", "no-images"])
def test_the_fake_has_the_strides_of_the_real_thing(name, input, weight, backend, device):
    given = tensors(name, device)
    given["input"] = LAYOUTS[input](given["input"])
    given["weight"] = LAYOUTS[weight](given["weight"])
    needed = [given["input"].requires_grad_(), given["weight"].requires_grad_()]
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(tensor) for name, tensor in given.items()}
        fake = masked_conv2d(**fakes, **CONVOLUTIONS[name][2])
        fake_gradients = torch.autograd.grad(fake.sum(), [fakes["input"], fakes["weight"]])
    real = masked_conv2d(**given, **CONVOLUTIONS[name][2])
    gradients = torch.autograd.grad(real.sum(), needed)
    assert [t.stride() for t in (fake, *fake_gradients)] == [t.stride() for t in (real, *gradients)]


def test_no_bias(backend, device, assert_like_formula):
    run(assert_like_formula, {}, **tensors("3x3", device) | {"bias": None})


def test_output_and_gradient_are_channels_last_where_the_input_is(backend, device):
    given = tensors("3x3", device)
    given["input"] = LAYOUTS["channels-last"](given["input"]).requires_grad_()
    out = masked_conv2d(**given)
    out.sum().backward()
    for tensor in (out, given["input"].grad):
        assert tensor.stride() == LAYOUTS["channels-last"](torch.empty(tensor.shape)).stride()


X, W = torch.ones(2, 4, 5, 5), torch.ones(6, 4, 3, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"mask": W[:, :, 0, 0] > 0},
            r"mask must broadcast to \(K, C, R, S\) = \(6, 4, 3, 3\), "
            r"got \(6, 4\); use mask\[\.\.\., None, None\]",
        ),
        ({"mask": W[:, :3] > 0}, r"got \(6, 3, 3, 3\); give each dimension the weight's size or 1"),
        (
            {"mask": W.to(torch.uint8)},
            r"mask must be bool or floating, got torch.uint8; use mask.bool",
        ),
        ({"mask": W.to("meta") > 0}, "mask is on meta and weight on cpu; move one"),
        ({"weight": W.to("meta"), "mask": W.to("meta") > 0}, "input is on cpu and weight on meta"),
        ({"bias": torch.ones(6, device="meta")}, "input is on cpu and bias on meta"),
        ({"input": X[:, :3]}, r"input has 3 channels, weight \(6, 4, 3, 3\) with groups=1 takes 4"),
        ({"groups": 2}, "input has 4 channels, weight .* with groups=2 takes 8"),
        (
            {"input": torch.ones(2, 16, 5, 5), "groups": 4},
            "6 output channels do not divide into groups=4",
        ),
        ({"groups": 0}, "groups must be at least 1, got 0"),
        (
            {"input": X.double()},
            "input is torch.float64 and weight torch.float32; they must be equal",
        ),
        ({"weight": W.bfloat16()}, "input is torch.float32 and weight torch.bfloat16"),
        ({"bias": torch.ones(6).double()}, "input is torch.float32 and bias torch.float64"),
        ({"input": X.int(), "weight": W.int()}, "weight must be floating, got torch.int32"),
        ({"bias": torch.ones(5)}, r"bias must be \(K,\) = \(6,\), got \(5,\)"),
        ({"input": X[0, 0]}, r"input must be \(N, C, H, W\) or \(C, H, W\), got \(5, 5\)"),
        ({"weight": W[0], "mask": W[0] > 0}, r"weight must be \(K, C, R, S\), got \(4, 3, 3\)"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"padding": -1}, "padding must be at least 0"),
        ({"dilation": 0}, "dilation must be at least 1"),
        ({"stride": (1, 2, 3)}, "stride must be an int or a pair"),
        ({"padding": "sane"}, "unknown padding 'sane'.*did you mean 'same'"),
        ({"padding": "same", "stride": 2}, r"padding 'same' needs stride 1, got \[2, 2\]"),
    ],
    ids=[
        "mask-short",
        "mask-size",
        "mask-dtype",
        "mask-device",
        "weight-device",
        "bias-device",
        "channels",
        "group-channels",
        "group-outputs",
        "no-group",
        "wide-input",
        "narrow-weight",
        "bias-dtype",
        "int",
        "bias-shape",
        "2-D-input",
        "3-D-weight",
        "stride",
        "padding",
        "dilation",
        "three-strides",
        "padding-name",
        "same-stride",
    ],
)
def test_refused(options, words):
    given = {"input": X, "weight": W, "mask": W > 0} | options
    with pytest.raises(RtkError, match=words):
        masked_conv2d(**given)


def test_no_fallback_from_a_forced_backend():
    with forced("cuda"), pytest.raises(RtkError, match="masked_conv2d: the forced backend 'cuda'"):
        masked_conv2d(X, W, W > 0)
