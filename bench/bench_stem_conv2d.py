"""stem_conv2d and its gradient on the stems of ResNets, against cuDNN with the steps around it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rtk

LAST = torch.channels_last
STEMS = {
    "r50-128x224": ((128, 3, 224, 224), 7, {"stride": 2, "padding": 3, "pool": True}),
    "r18-512x32": ((512, 3, 32, 32), 3, {"stride": 1, "padding": 1, "pool": False}),
    "r18-128x32": ((128, 3, 32, 32), 3, {"stride": 1, "padding": 1, "pool": False}),
}
K = 64


def _arguments(shape: tuple[int, ...], taps: int) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cuda")

    mean = torch.tensor([0.485, 0.456, 0.406], device="cuda")
    std = torch.tensor([0.229, 0.224, 0.225], device="cuda")
    return [randn(*shape).sigmoid(), randn(K, 3, taps, taps) / taps, randn(K), mean, std]


def _unfused(x, weight, bias, mean, std, stride, padding, pool) -> Tensor:
    """What a model does whose batch norm is folded: bf16, channels_last, cuDNN."""
    normalised = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    normalised = normalised.to(torch.bfloat16, memory_format=LAST)
    out = F.conv2d(normalised, weight, bias, stride, padding).relu()
    return F.max_pool2d(out, 3, 2, 1) if pool else out


def _peer(name: str) -> Callable[..., Tensor]:
    return torch.compile(_unfused) if name == "torch.compile" else _unfused


def _work(shape: tuple[int, ...], taps: int, geometry: dict) -> tuple[int, int, int]:
    """Return the bytes of the image, those of out and index, and the FLOPs."""
    n, _, h, w = shape
    stride = geometry["stride"]
    pixels = n * (h // stride) * (w // stride)
    kept = pixels // 4 if geometry["pool"] else pixels
    image = 4 * n * 3 * h * w
    return image, kept * K * (3 if geometry["pool"] else 2), 2 * pixels * K * 3 * taps**2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("peer", ["rtk", "eager", "torch.compile"])
@pytest.mark.parametrize("stem", STEMS)
def bench_stem_conv2d(stem, peer, measure, benchmark):
    benchmark.group = f"stem_conv2d {stem}"
    shape, taps, geometry = STEMS[stem]
    given = _arguments(shape, taps)
    image, activations, flops = _work(shape, taps, geometry)
    ready = [given[0], *(t.bfloat16() for t in given[1:3]), *given[3:]]
    ready[1] = ready[1].contiguous(memory_format=LAST)
    unfused = _peer(peer)
    with torch.no_grad():
        result = measure(
            (lambda: rtk.ops.stem_conv2d(*given, **geometry)[0])
            if peer == "rtk"
            else (lambda: unfused(*ready, **geometry)),
            bytes=image + activations,
            flops=flops,
            device="cuda",
        )
        wanted = _unfused(*ready, **geometry)
    torch.testing.assert_close(result.float(), wanted.float(), rtol=3e-2, atol=5e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("peer", ["rtk", "eager", "torch.compile"])
@pytest.mark.parametrize("stem", STEMS)
def bench_stem_conv2d_bwd_input(stem, peer, measure, benchmark):
    benchmark.group = f"stem_conv2d_bwd_input {stem}"
    shape, taps, geometry = STEMS[stem]
    given = _arguments(shape, taps)
    image, activations, flops = _work(shape, taps, geometry)
    out, index = rtk.ops.stem_conv2d(*given, **geometry)
    grad = torch.randn_like(out) * (out > 0)
    options = {"input_size": shape, **geometry}

    def ours() -> Tensor:
        return rtk.ops.stem_conv2d_bwd_input(grad, index, given[1], given[4], **options)

    ready = [given[0].clone().requires_grad_(), *(t.bfloat16() for t in given[1:3]), *given[3:]]
    ready[1] = ready[1].contiguous(memory_format=LAST)
    if peer == "rtk":
        result = measure(ours, bytes=image + activations, flops=flops, device="cuda")
    else:
        with torch._functorch.config.patch(donated_buffer=False):  # its backward runs many times
            loss = _peer(peer)(*ready, **geometry)

        def theirs() -> Tensor:
            return torch.autograd.grad(loss, ready[0], grad, retain_graph=True)[0]

        result = measure(theirs, bytes=image + activations, flops=flops, device="cuda")
    # Of two maxima that nearly tie either may win: the directions agree, not each pixel.
    cosine = F.cosine_similarity(result.float().flatten(), ours().flatten(), dim=0)
    assert cosine > 0.99
