"""max_pool2d: PyTorch's max-pool in values and gradients, ties, NaN and infinities included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rtk import nn as rtk_nn
from rtk.errors import RtkError
from rtk.ops import backend as forced
from rtk.ops import max_pool2d

OP = "max_pool2d"
LAST = torch.channels_last
SHAPES = [(2, 8, 9, 7), (1, 16, 1, 1), (3, 24, 2, 5), (2, 64, 14, 14), (0, 8, 4, 4), (5, 72, 11, 6)]


def images(shape, device, dtype=torch.float32):
    x = torch.randn(shape)
    x = x.round() if shape[1] % 16 else x  # of whole numbers many are equal
    return x.to(device, dtype).contiguous(memory_format=LAST)


def check(x):
    """Compare with PyTorch on the CPU: its CUDA kernel loses the place in a window of -inf."""
    mine, theirs = x.clone().requires_grad_(), x.detach().cpu().requires_grad_()
    out = max_pool2d(mine)
    wanted = F.max_pool2d(theirs, 3, 2, 1)
    torch.testing.assert_close(out.cpu(), wanted, rtol=0, atol=0, equal_nan=True)
    assert out.is_contiguous(memory_format=LAST)
    grad = torch.randint(-4, 5, out.shape).to(x.dtype)  # sums are exact
    out.backward(grad.to(x.device))
    wanted.backward(grad)
    torch.testing.assert_close(mine.grad.cpu(), theirs.grad, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_pytorchs(shape, dtype, backend, device):
    check(images(shape, device, dtype))


def test_nan_and_infinities(backend, device):
    x = images((2, 8, 9, 9), device)
    for value in (float("nan"), float("inf"), -float("inf")):
        x[torch.rand(x.shape, device=device) < 0.2] = value
    x[1, :4] = -float("inf")
    check(x)


@pytest.mark.parametrize("contiguous", [True, False])
def test_an_upstream_gradient_in_any_layout(contiguous, backend, device):
    x = images((2, 8, 9, 9), device).requires_grad_()
    out = max_pool2d(x)
    grad = torch.ones_like(out) if contiguous else torch.ones((), device=device).expand(out.shape)
    (found,) = torch.autograd.grad(out, x, grad.contiguous() if contiguous else grad)
    wanted = torch.autograd.grad(F.max_pool2d(x, 3, 2, 1).sum(), x)[0]
    torch.testing.assert_close(found, wanted)


def test_bad_input():
    with pytest.raises(RtkError, match=r"must be \(N, C, H, W\)"):
        max_pool2d(torch.rand(3, 4, 4))
    with pytest.raises(RtkError, match="floating"):
        max_pool2d(torch.zeros(1, 8, 4, 4, dtype=torch.int64))
    with pytest.raises(RtkError, match="no pixels"):
        max_pool2d(torch.zeros(1, 8, 0, 4))


@pytest.mark.parametrize("kernel", [3, 2])
def test_the_layer_is_nn_max_pool2d(kernel, device):
    x = images((2, 8, 9, 9), device)
    layer, plain = (kind(kernel, stride=2, padding=1) for kind in LAYERS)
    assert torch.equal(layer(x), plain(x))
    assert repr(layer) == repr(plain)


LAYERS = (rtk_nn.MaxPool2d, torch.nn.MaxPool2d)

INTERPRETED = """
import torch
from rtk.ops._registry import ops

run = {n: {i.backend: i.run for i in ops[n].implementations} for n in ops}
for shape in [(2, 8, 9, 7), (1, 16, 1, 1), (3, 72, 2, 5)]:
    x = torch.randn(shape).round().to(memory_format=torch.channels_last)
    (out, place), wanted = (run["max_pool2d"][b](x) for b in ("triton", "reference"))
    assert torch.equal(out, wanted[0]) and torch.equal(place, wanted[1])
    grad = torch.randint(-4, 5, out.shape).float().to(memory_format=torch.channels_last)
    dx, wanted = (
        run["max_pool2d_bwd"][b](grad, place, list(shape[2:])) for b in ("triton", "reference")
    )
    assert torch.equal(dx, wanted)
"""


def test_the_triton_kernels_under_the_interpreter(interpret):
    interpret(INTERPRETED)


@pytest.mark.parametrize(
    ("kernel", "loads", "stores"), [("forward", 9, 1), ("backward", 4, 4)], ids=str
)
def test_the_triton_kernels_move_16_bytes_a_thread(kernel, loads, stores, compile_for_hopper):
    from rtk.kernels import max_pool2d as kernels

    function = getattr(kernels, f"max_pool2d_{kernel}")
    types = {name: "*bf16" if name.endswith("_ptr") else "i32" for name in function.arg_names}
    types["place_ptr"] = "*u8"
    constants = {"BLOCK_P": 32, "BLOCK_C": 64}
    built = compile_for_hopper(function, types, constants, divisible=("channels",), num_warps=8)
    accesses = built.accesses()
    assert accesses.count("ld.v4.b32") == loads and accesses.count("st.v4.b32") == stores
    assert built.resources["LOCAL"] == built.resources["STACK"] == 0


@pytest.mark.gpu
def test_what_the_kernel_does_not_take_goes_to_the_reference():
    x = torch.rand(2, 6, 9, 9, device="cuda")
    assert torch.equal(max_pool2d(x), F.max_pool2d(x, 3, 2, 1))
    with forced("triton"), pytest.raises(RtkError, match="channels_last"):
        max_pool2d(x)
