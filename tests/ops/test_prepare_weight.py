"""prepare_weight: the same bits as torch.where, or as the product in fp32, on every backend."""

from __future__ import annotations

import pytest
import torch

from rtk.errors import RtkError
from rtk.ops import backend as forced
from rtk.ops import prepare_weight
from rtk.ops.prepare_weight import prepare_all_now

OP = "prepare_weight"
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = {
    "element": ((6, 5, 3, 3), (6, 5, 3, 3)),
    "row": ((6, 5, 3, 3), (6, 5, 3, 1)),
    "kernel": ((6, 5, 3, 3), (6, 5, 1, 1)),
    "channel": ((6, 5, 3, 3), (6, 1, 1, 1)),
    "one-number": ((6, 5, 3, 3), ()),
    "1x1": ((40, 33, 1, 1), (40, 33, 1, 1)),
    "linear": ((7, 13), (7, 13)),
    "linear-outputs": ((7, 13), (7, 1)),
    "3-D": ((5, 3, 7), (3, 1)),
    "nothing": ((0, 3, 3, 3), (1, 3, 3, 3)),
    "large": ((64, 64, 3, 3), (64, 64, 3, 3)),  # several threads
}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def expected(weight, mask, dtype):
    if mask.dtype == torch.bool:
        return torch.where(mask, weight, torch.zeros_like(weight)).to(dtype)
    exact = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(exact) * mask.to(exact)).to(dtype)


def assert_same_bits(actual, wanted):
    """NaN equals NaN, and -0 differs from +0."""
    assert actual.dtype == wanted.dtype
    torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(actual.signbit() & ~actual.isnan(), wanted.signbit() & ~wanted.isnan())


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("mask", [torch.bool, *FLOATS], ids=name_of)
@pytest.mark.parametrize("weight", FLOATS, ids=name_of)
def test_every_dtype_gives_the_same_bits(weight, mask, dtype, backend, device):
    w = torch.randn(6, 5, 3, 3, dtype=torch.float64)
    # What rounds, overflows in fp16, is subnormal in fp16 and bf16, or is not a number.
    w.view(-1)[:7] = torch.tensor([0.0, -0.0, 7e4, 1e-7, 1e-39, torch.inf, torch.nan])
    w = w.to(device, weight)
    m = torch.rand(6, 5, 3, 3).to(device) < 0.5
    if mask != torch.bool:
        m = (m * torch.randn(m.shape, device=device)).to(mask)
    assert_same_bits(prepare_weight(w, m, dtype=dtype), expected(w, m, dtype))


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32], ids=name_of)
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape(name, mask_dtype, backend, device, two_threads):
    shape, mask_shape = SHAPES[name]
    w = torch.randn(shape, device=device)
    m = (torch.rand(mask_shape, device=device) < 0.5).to(mask_dtype)
    assert_same_bits(prepare_weight(w, m), expected(w, m, torch.float32))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -1.0])
def test_pruned_is_plus_zero_whatever_the_master_holds(poison, backend, device):
    m = torch.rand(6, 5, 3, 3, device=device) < 0.5
    w = torch.randn(m.shape, device=device).masked_fill(~m, poison)
    out = prepare_weight(w, m, dtype=torch.bfloat16)
    assert_same_bits(out[~m], torch.zeros_like(out[~m]))
    assert torch.equal(out[m], w[m].bfloat16())


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize(
    "given",
    [
        lambda t: t,
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.flip(1)[:, ::2],
        lambda t: t[:1].expand(t.shape),
    ],
    ids=["contiguous", "channels-last", "every-second", "expanded"],
)
def test_every_layout(given, channels_last, backend, device):
    w, m = given(torch.randn(6, 5, 3, 4)).to(device), given(torch.rand(6, 5, 3, 4) < 0.5).to(device)
    out = prepare_weight(w, m, channels_last=channels_last)
    format = torch.channels_last if channels_last else torch.contiguous_format
    assert out.stride() == torch.empty(w.shape).to(memory_format=format).stride()
    assert_same_bits(out, expected(w, m, torch.float32))


@pytest.mark.parametrize(
    ("weight", "mask", "dtype"),
    [
        (torch.float64, torch.float64, torch.float64),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.float32, torch.bool, torch.float16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("name", [n for n in SHAPES if n != "large"])
def test_gradients(name, weight, mask, dtype, backend, device, assert_like_formula):
    shape, mask_shape = SHAPES[name]
    assert_like_formula(
        lambda w, m: prepare_weight(w, m, dtype=dtype),
        lambda w, m: w * m,
        weight=torch.randn(shape, device=device).to(weight),
        mask=torch.randint(0, 3, mask_shape, device=device).to(mask),
    )


def test_gradient_of_a_poisoned_pruned_weight_is_zero(backend, device):
    m = torch.rand(6, 5, device=device) < 0.5
    w = torch.randn(m.shape, device=device).masked_fill(~m, torch.nan).requires_grad_()
    prepare_weight(w, m).square().sum().backward()
    assert torch.equal(w.grad, torch.where(m, 2 * w.detach(), 0.0))


@pytest.mark.parametrize("mask", [(3, 2, 2, 2), (3, 2, 2, 1), (3, 1, 1, 1), (2,), ()], ids=str)
def test_gradcheck(mask):
    w, m = torch.randn(3, 2, 2, 2, dtype=torch.float64), torch.randn(mask, dtype=torch.float64)
    given = (w.requires_grad_(), m.requires_grad_())
    assert torch.autograd.gradcheck(lambda w, m: prepare_weight(w, m, channels_last=True), given)


W = torch.ones(4, 3, 2, 2)


@pytest.mark.parametrize(
    ("weight", "mask", "options", "words"),
    [
        (
            W,
            torch.ones(4, 3) > 0,
            {},
            "mask must broadcast .* got \\(4, 3\\); use mask.*None, None",
        ),
        (W, torch.ones(5, 1, 1, 1) > 0, {}, "give each dimension the weight's size or 1"),
        (W, torch.ones(1, 4, 3, 2, 2) > 0, {}, "mask must broadcast"),
        (W, W.to(torch.uint8), {}, "mask must be bool or floating, got torch.uint8; use mask.bool"),
        (W, W.to("meta") > 0, {}, "mask is on meta and weight on cpu; move one"),
        (W.int(), W > 0, {}, "weight must be floating, got torch.int32"),
        (W, W > 0, {"dtype": torch.int8}, "dtype must be floating, got torch.int8"),
        (
            W[0, 0],
            W[0, 0] > 0,
            {"channels_last": True},
            "channels_last needs a 4-D weight, got 2-D",
        ),
    ],
    ids=["short", "size", "long", "uint8", "device", "weight", "dtype", "2-D"],
)
def test_refused(weight, mask, options, words):
    with pytest.raises(RtkError, match=f"prepare_weight: .*{words}"):
        prepare_weight(weight, mask, **options)


def test_the_cpu_backend_refuses_five_dimensions_and_the_reference_takes_them():
    w, m = torch.randn(2, 2, 2, 2, 2), torch.rand(2, 2, 2, 2, 2) < 0.5
    assert torch.equal(prepare_weight(w, m), w * m)
    with forced("cpu"), pytest.raises(RtkError, match=r"forced backend 'cpu' cannot.*5-D"):
        prepare_weight(w, m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_many_layers_at_once_are_each_what_it_is_alone(dtype, device):
    torch.manual_seed(0)
    sizes = [(8, 4, 3, 3), (3, 5, 1, 1), (1, 1, 7, 7), (0, 3, 3, 3)] + [(64, 8, 3, 3)] * 120
    weights = [torch.randn(size, device=device).to(torch.bfloat16) for size in sizes]
    masks = [torch.rand(size, device=device) < 0.5 for size in sizes]
    last = [t.to(memory_format=torch.channels_last) for t in (*weights, *masks)]
    alike = last[: len(sizes)], last[len(sizes) :]  # one run of elements each
    mixed = [weights[0].float(), *alike[0][1:]], [masks[0][:, :1], masks[1], *alike[1][2:]]
    for some_weights, some_masks in (alike, mixed, ([], [])):
        results = prepare_all_now(some_weights, some_masks, dtype, True)
        assert len(results) == len(some_weights)
        for result, weight, mask in zip(results, some_weights, some_masks, strict=True):
            assert result.is_contiguous(memory_format=torch.channels_last)
            assert_same_bits(result, expected(weight, mask, dtype))
