"""max_pool2d: the max-pool of a ResNet's stem, with one byte a maximum kept for the way back."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rtk.ops import _compiled
from rtk.ops._registry import Op, require
from rtk.ops._triton import why_not_triton
from rtk.ops.prepare_weight import FLOATS

_LAST = torch.channels_last
_WINDOW, _STRIDE, _PADDING = 3, 2, 1
_BLOCK = {"BLOCK_P": 32, "BLOCK_C": 64, "num_warps": 8}


def max_pool2d(x: Tensor) -> Tensor:
    """Pool 3x3 windows with stride 2 and padding 1: `F.max_pool2d(x, 3, 2, 1)`.

    Both directions read and write each tensor once; PyTorch keeps eight bytes a maximum, and its
    backward takes ten times as long on a GPU.

    Args:
        x: (N, C, H, W), floating. The GPU kernel takes bf16, fp16 and fp32 in channels_last, with C
            a multiple of 8.

    Returns:
        (N, C, ceil(H / 2), ceil(W / 2)), like x, differentiable once. As in PyTorch a window with
        a NaN gives NaN, and of equal maxima the first one gets the gradient; where several maxima
        meet in a pixel, their gradients are summed in fp32.

    Raises:
        RtkError: if x is not (N, C, H, W) floating, or has no pixels.
    """
    return _op(x)[0]


def _check(x: Tensor) -> None:
    require(x.dim() == 4, "max_pool2d: x must be (N, C, H, W), got %s", tuple(x.shape))
    require(x.dtype in FLOATS, "max_pool2d: x must be floating, got %s", x.dtype)
    require(min(x.shape[1:]) > 0, "max_pool2d: x has no pixels: %s", tuple(x.shape))


def _empty(x: Tensor) -> tuple[Tensor, Tensor]:
    n, c, h, w = x.shape
    size = n, c, (h - 1) // _STRIDE + 1, (w - 1) // _STRIDE + 1
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=_LAST)
    return out, torch.empty(size, dtype=torch.uint8, device=x.device, memory_format=_LAST)


_op = Op("max_pool2d(Tensor x) -> (Tensor, Tensor)", _check, _empty)


def _why_not(x: Tensor) -> str | None:
    reason = why_not_triton(x) or _compiled.why_not_dtype(
        x, "x", torch.bfloat16, torch.float16, torch.float32
    )
    if reason is None and not x.is_contiguous(memory_format=_LAST):
        return "x is not channels_last"
    if reason is None and x.shape[1] % 8:
        return f"it takes a multiple of 8 channels, not {x.shape[1]}"
    if reason is None and x.shape[0] * x.shape[2] * x.shape[3] >= 2**31:
        return "it counts pixels in 32 bits"
    return reason


def _grid(pixels: int, channels: int) -> tuple[int, int]:
    return -(-pixels // _BLOCK["BLOCK_P"]), -(-channels // _BLOCK["BLOCK_C"])


@_op.implementation("triton", _why_not)
def _triton(x: Tensor) -> tuple[Tensor, Tensor]:
    from rtk.kernels.max_pool2d import max_pool2d_forward

    out, place = _empty(x)
    n, c, oh, ow = out.shape
    if n:
        max_pool2d_forward[_grid(n * oh * ow, c)](
            x, out, place, n * oh * ow, *x.shape[2:], oh, ow, c, **_BLOCK
        )
    return out, place


@_op.implementation("reference")
def _reference(x: Tensor) -> tuple[Tensor, Tensor]:
    out, place = _empty(x)
    if x.shape[0] == 0:
        return out, place
    # Contiguous: in channels_last PyTorch's CUDA kernel has no place for a window of -inf.
    pooled, flat = F.max_pool2d(x.contiguous(), _WINDOW, _STRIDE, _PADDING, return_indices=True)
    rows, columns = (
        _STRIDE * torch.arange(size, device=x.device) - _PADDING for size in out.shape[2:]
    )
    width = x.shape[3]
    place.copy_((flat // width - rows[:, None]) * _WINDOW + flat % width - columns)
    return out.copy_(pooled), place


def _check_bwd(grad: Tensor, place: Tensor, size: list[int]) -> None:
    require(
        grad.shape == place.shape and place.dtype == torch.uint8,
        "max_pool2d_bwd: grad must be %s like the places, got %s",
        tuple(place.shape),
        tuple(grad.shape),
    )


def _empty_bwd(grad: Tensor, place: Tensor, size: list[int]) -> Tensor:
    c, h, w = grad.shape[1], *size
    shape = grad.shape[0], c, h, w
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=_LAST)


_op_bwd = Op(
    "max_pool2d_bwd(Tensor grad, Tensor place, SymInt[2] size) -> Tensor", _check_bwd, _empty_bwd
)


@_op_bwd.implementation("triton", lambda grad, place, size: _why_not(grad))
def _triton_bwd(grad: Tensor, place: Tensor, size: list[int]) -> Tensor:
    from rtk.kernels.max_pool2d import max_pool2d_backward

    dx = _empty_bwd(grad, place, size)
    n, c, oh, ow = grad.shape
    rows, columns = (-(-length // 2) for length in size)
    if n:
        max_pool2d_backward[_grid(n * rows * columns, c)](
            grad, place, dx, n * rows * columns, rows, columns, *size, oh, ow, c, **_BLOCK
        )
    return dx


@_op_bwd.implementation("reference")
def _reference_bwd(grad: Tensor, place: Tensor, size: list[int]) -> Tensor:
    dx = _empty_bwd(grad, place, size)
    exact = torch.promote_types(grad.dtype, torch.float32)
    h, w = (
        _STRIDE * torch.arange(length, device=grad.device) - _PADDING for length in grad.shape[2:]
    )
    row, column = place // _WINDOW + h[:, None], place % _WINDOW + w
    flat = (row * size[1] + column).flatten(2)
    sums = torch.zeros(*grad.shape[:2], size[0] * size[1], dtype=exact, device=grad.device)
    sums.scatter_add_(2, flat, grad.to(exact).flatten(2))
    return dx.copy_(sums.view(dx.shape))


class _Autograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        out, place = _op.below_autograd(x)
        ctx.save_for_backward(place)
        ctx.mark_non_differentiable(place)
        ctx.size = x.shape[2:]
        return out, place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Tensor:
        (place,) = ctx.saved_tensors
        return _op_bwd(grad.contiguous(memory_format=_LAST), place, list(ctx.size))


_op.autograd(_Autograd)
