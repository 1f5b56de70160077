"""pgd_step against eager PyTorch, torch.compile and a plain Triton kernel; its floor beside it.

Bytes a pixel, read and written: 16 in fp32; 11 with the gradient in bf16, as the model returns it
under autocast, and the origin in uint8, as it was loaded; 7 with the images in bf16 as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import rtk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = (512, 3, 32, 32)
SHAPES = [SMALL, (256, 3, 224, 224), (1024, 3, 224, 224)] if DEVICE == "cuda" else [SMALL]
NUMBERS = {"linf": (8 / 255, 2 / 255), "l2": (0.5, 0.1)}  # eps, step size
TYPES = {  # x_adv and the result, gradient, origin
    "fp32": (torch.float32, torch.float32, torch.float32),
    "compact": (torch.float32, torch.bfloat16, torch.uint8),
    "compact-bf16": (torch.bfloat16, torch.bfloat16, torch.uint8),
}
PEERS = {
    "linf": ["rtk", "eager", "torch.compile", "plain"],
    "l2": ["rtk", "eager", "torch.compile", "traffic"],
}


def _pixels(x: Tensor) -> Tensor:
    return x.float() / 255 if x.dtype == torch.uint8 else x.float()


def _linf(x_adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    eps, step = NUMBERS["linf"]
    origin = _pixels(x)
    delta = (x_adv.float() + step * grad.float().sign() - origin).clamp(-eps, eps)
    return (origin + delta).clamp(0, 1).to(x_adv.dtype)


def _l2(x_adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    eps, step = NUMBERS["l2"]
    origin, grad = _pixels(x), grad.float()
    norm = grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 1e-10
    delta = x_adv.float() + step * grad / norm - origin
    size = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return (origin + delta * (eps / size).clamp(max=1)).clamp(0, 1).to(x_adv.dtype)


def _robustness_l2(x_adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """As robustness 1.2.1 writes L2Step.step and .project."""
    eps, step = NUMBERS["l2"]
    origin, grad = _pixels(x), grad.float()
    norm = torch.norm(grad.view(grad.shape[0], -1), dim=1).view(-1, 1, 1, 1)
    difference = x_adv.float() + grad / (norm + 1e-10) * step - origin
    difference = difference.renorm(p=2, dim=0, maxnorm=eps)
    return torch.clamp(origin + difference, 0, 1).to(x_adv.dtype)


@triton.jit
def _plain_kernel(x_adv_ptr, grad_ptr, x_ptr, out_ptr, count, step, eps, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    x_adv, grad, x = (
        tl.load(x_adv_ptr + at, mask=inside),
        tl.load(grad_ptr + at, mask=inside),
        tl.load(x_ptr + at, mask=inside),
    )
    moved = x_adv + tl.where(grad > 0, step, tl.where(grad < 0, -step, 0.0)) - x
    out = x + tl.minimum(tl.maximum(moved, -eps), eps)
    tl.store(out_ptr + at, tl.minimum(tl.maximum(out, 0.0), 1.0), mask=inside)


def _plain(x_adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    eps, step = NUMBERS["linf"]
    out = torch.empty_like(x_adv)
    grid = (triton.cdiv(out.numel(), 1024),)
    _plain_kernel[grid](x_adv, grad, x, out, out.numel(), step, eps, BLOCK=1024)
    return out


def _traffic(x_adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """No step: one elementwise kernel of PyTorch that reads and writes what a step must."""
    return torch.addcmul(x_adv, grad, x)


def _rtk(norm: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    eps, step = NUMBERS[norm]
    return lambda x_adv, grad, x: rtk.ops.pgd_step(
        x_adv, grad, x, eps=eps, step_size=step, norm=norm
    )


def _inputs(shape: tuple[int, ...], types: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    adv_dtype, grad_dtype, x_dtype = TYPES[types]
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.rand(shape, generator=generator, device=DEVICE)
    noise = torch.randn(shape, generator=generator, device=DEVICE)
    x_adv = (x + 0.01 * noise).clamp(0, 1).to(adv_dtype)
    grad = torch.randn(shape, generator=generator, device=DEVICE).to(grad_dtype)
    return x_adv, grad, (x * 255).to(x_dtype) if x_dtype == torch.uint8 else x


CASES = [
    pytest.param(norm, types, peer, shape, id=f"{peer}-{types}-{norm}-{'x'.join(map(str, shape))}")
    for norm in ("linf", "l2")
    for types in (TYPES if DEVICE == "cuda" else ["fp32"])
    for peer in PEERS[norm]
    for shape in SHAPES
    if peer not in ("plain", "traffic") or (types == "fp32" and DEVICE == "cuda")
]


@pytest.mark.parametrize(("norm", "types", "peer", "shape"), CASES)
def bench_pgd_step(norm, types, peer, shape, measure, benchmark):
    benchmark.group = f"pgd_step {norm} {'x'.join(map(str, shape))}"
    torch._dynamo.reset()
    formula = {"linf": _linf, "l2": _l2}[norm]
    function = {
        "rtk": _rtk(norm),
        "eager": formula if norm == "linf" else _robustness_l2,
        "torch.compile": torch.compile(formula),
        "plain": _plain,
        "traffic": _traffic,
    }[peer]
    sets = [_inputs(shape, types, seed) for seed in range(3)]
    turns = itertools.cycle(sets)
    bytes_ = sum(t.numel() * t.element_size() for t in (*sets[0], sets[0][0]))
    measure(lambda: function(*next(turns)), bytes=bytes_, device=DEVICE)
    if peer == "traffic":
        return
    tolerance = 4e-3 if types == "compact-bf16" else 1e-6
    for given in sets:
        torch.testing.assert_close(function(*given), formula(*given), atol=tolerance, rtol=0)
