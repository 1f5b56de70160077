"""fused_conv2d on every kind of layer of a ResNet-18 and a ResNet-50, both ways, against cuDNN.

What an attack's inner loop asks for. Forward: bias, the block's skip where it is added, ReLU, and
for the way back the bits (rtk) or the activation itself (cuDNN, at no cost). Backward: the input
gradient, the skip's gradient where it is added, gated by those.

The FLOPs are those of the forward convolution in both directions: zeros that stride 2 puts between
pixels count as no work. The bytes are those that rtk has to move, for both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fused_conv2d_peers import cudnn
from torch import Tensor

import rtk
from rtk.ops import fused_conv2d, fused_conv2d_bwd_input, pack_positive, turn_filter

LAST = torch.channels_last
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@dataclass(frozen=True)
class Layer:
    """A convolution of a residual block: c channels of size x size pixels to k channels.

    `role` is "first" in its block (backward, it adds the skip's gradient), "inner", "last"
    (forward, it adds the skip) or "shortcut" (neither ReLU nor gate). `skip` is the stride of the
    block's shortcut: at 2, its gradient belongs to every second pixel.
    """

    role: str
    c: int
    k: int
    size: int
    taps: int
    stride: int = 1
    skip: int = 1

    def __str__(self) -> str:
        name = f"{self.role}-{self.taps}x{self.taps}-{self.c}to{self.k}-{self.size}px"
        return name + f"-stride{self.stride}" + (f"-skip{self.skip}" if self.skip > 1 else "")

    @property
    def out_size(self) -> int:
        return self.size // self.stride


def _resnet18(size: int) -> Iterator[Layer]:
    """Yield the layers of basic blocks; `size` is behind the stem."""
    c = 64
    for k in (64, 128, 256, 512):
        if k != c:
            yield Layer("first", c, k, size, 3, stride=2, skip=2)
            yield Layer("shortcut", c, k, size, 1, stride=2)
            size //= 2
        yield Layer("first", k, k, size, 3)
        yield Layer("last", k, k, size, 3)
        c = k


def _resnet50(size: int) -> Iterator[Layer]:
    """Yield the layers of bottlenecks; `size` is behind the stem."""
    c = 64
    for width in (64, 128, 256, 512):
        k, stride = 4 * width, 1 if width == 64 else 2
        yield Layer("first", c, width, size, 1, skip=stride)
        if stride == 2:
            yield Layer("inner", width, width, size, 3, stride=2)
        yield Layer("shortcut", c, k, size, 1, stride=stride)
        size //= stride
        yield Layer("first", k, width, size, 1)
        yield Layer("inner", width, width, size, 3)
        yield Layer("last", width, k, size, 1)
        c = k


CASES = [
    pytest.param(network, n, layer, id=f"{network}-{n}-{layer}")
    for network, layers, batches in (
        ("resnet18-32px", _resnet18(32), (128, 512)),
        ("resnet50-224px", _resnet50(56), (128,)),
    )
    for layer in layers
    for n in batches
]


def _normal(*shape: int, scale: float = 1.0) -> Tensor:
    tensor = (scale * torch.randn(shape, device="cuda")).bfloat16()
    return tensor.contiguous(memory_format=LAST)


def _weight(layer: Layer) -> Tensor:
    reduced = layer.c * layer.taps**2
    return _normal(layer.k, layer.c, layer.taps, layer.taps, scale=reduced**-0.5)


def _flops(layer: Layer, n: int) -> int:
    return 2 * n * layer.out_size**2 * layer.k * layer.c * layer.taps**2


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _assert_near(out: Tensor, wanted: Tensor, peer: str) -> None:
    # rtk's result is rounded once, as the wanted one; cuDNN may round before the residual is added.
    rtol, atol = (2.0**-7, 1e-3) if peer == "rtk" else (2.0**-6, 2.0**-5)
    torch.testing.assert_close(out.float(), wanted.float(), rtol=rtol, atol=atol)


@pytest.fixture(autouse=True)
def _same_numbers_and_fastest_cudnn() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True), torch.no_grad():
        yield


@contextlib.contextmanager
def _reference() -> Iterator[None]:
    """In fp32, and with no search for its fastest algorithm."""
    with rtk.ops.backend("reference"), torch.backends.cudnn.flags(enabled=True):
        yield


@pytest.mark.parametrize("peer", ["rtk", "cudnn"])
@pytest.mark.parametrize(("network", "n", "layer"), CASES)
def bench_fused_conv2d(network, n, layer, peer, measure, benchmark):
    benchmark.group = f"fused_conv2d {network} {n} {layer}"
    relu = layer.role != "shortcut"
    x, weight = _normal(n, layer.c, layer.size, layer.size).relu_(), _weight(layer)
    half_bias = torch.randn(layer.k, device="cuda").bfloat16()
    bias = half_bias.float()  # as folded layers have it
    pixels = (layer.out_size, layer.out_size)
    residual = _normal(n, layer.k, *pixels).relu_() if layer.role == "last" else None
    options: dict[str, Any] = {"stride": layer.stride, "padding": layer.taps // 2, "relu": relu}

    def ours() -> Any:
        return fused_conv2d(x, weight, bias, residual, save_positive=relu, **options)

    def theirs() -> Tensor:
        return cudnn(x, weight, half_bias, residual, **options)

    with _reference():
        wanted = fused_conv2d(x, weight, bias, residual, **options)
    bits = pack_positive(wanted) if relu else None
    run = ours if peer == "rtk" else theirs
    with rtk.ops.tuning():
        run()
    out = measure(
        run,
        bytes=_bytes(x, weight, bias, residual, wanted, bits),
        flops=_flops(layer, n),
        device="cuda",
    )
    if isinstance(out, tuple):
        out, positive = out
        assert torch.equal(positive, pack_positive(out))
    _assert_near(out, wanted, peer)


@pytest.mark.parametrize("peer", ["rtk", "cudnn"])
@pytest.mark.parametrize(("network", "n", "layer"), CASES)
def bench_fused_conv2d_bwd_input(network, n, layer, peer, measure, benchmark):
    benchmark.group = f"fused_conv2d_bwd_input {network} {n} {layer}"
    weight = _weight(layer)
    turned = turn_filter(weight)
    grad = _normal(n, layer.k, layer.out_size, layer.out_size)
    # The attack leaves a strided shortcut's gradient small: it is the first layer's residual.
    is_small = layer.role == "shortcut"
    stride, size = (1, layer.out_size) if is_small else (layer.stride, layer.size)
    padding, skip = layer.taps // 2, layer.skip
    activation = None if is_small else _normal(n, layer.c, size, size).relu_()
    bits = None if activation is None else pack_positive(activation)
    residual = None
    if layer.role == "first":
        residual = _normal(n, layer.c, size // skip, size // skip)

    def ours(gate: Tensor | None = bits) -> Tensor:
        return fused_conv2d_bwd_input(
            grad,
            turned,
            (size, size),
            residual=residual,
            gate=gate,
            stride=stride,
            padding=padding,
            residual_stride=skip,
        )

    def theirs() -> Tensor:
        return cudnn(
            grad,
            turned,
            residual=residual,
            gate=activation,
            padding=layer.taps - 1 - padding,
            upsample=stride,
            out_size=(size, size),
            residual_stride=skip,
            forward_weight=weight,
        )

    with _reference():
        wanted = ours(activation)
    run = ours if peer == "rtk" else theirs
    with rtk.ops.tuning():
        run()
    out = measure(
        run,
        bytes=_bytes(grad, turned, residual, bits, wanted),
        flops=_flops(layer, n),
        device="cuda",
    )
    _assert_near(out, wanted, peer)
