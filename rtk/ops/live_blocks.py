"""live_blocks: which square blocks of a weight have anything to multiply, for `block_matmul`.

N outputs, K inputs. Made on the device whenever the mask changes, of a size that does not depend on
it, so a captured graph follows a mask that is updated in place.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from rtk.ops import _compiled
from rtk.ops._registry import Op, require
from rtk.ops._triton import why_not_triton
from rtk.ops.prepare_weight import FLOATS

_SIZES = (32, 64, 128)  # of a block, that the kernel takes


def live_blocks(weight: Tensor, block_size: int) -> Tensor:
    """Return the mask with which `block_matmul` multiplies by `weight`, passing over dead blocks.

    It is True where any weight of a block is not 0, so the product is that by the whole weight,
    whatever is zero in it.

    Args:
        weight: (N, K), the prepared weight (floating; NaN is not 0, -0 is) or its mask (bool), of
            any strides.
        block_size: outputs and inputs of a block; must divide N and K.

    Returns:
        (N / block_size, K / block_size) bool, dense; it does not require grad.

    Raises:
        RtkError: if the shape or the dtype does not fit.
    """
    return _op(weight, block_size)


def _check(weight: Tensor, block_size: int) -> None:
    require(
        weight.dtype == torch.bool or weight.dtype in FLOATS,
        "live_blocks: weight must be floating, or a bool mask, got %s; use mask.bool()",
        weight.dtype,
    )
    require(
        weight.dim() == 2,
        "live_blocks: weight must be (N, K), got %s; of a 1x1 filter pass weight.flatten(1)",
        tuple(weight.shape),
    )
    require(block_size >= 1, "live_blocks: block_size must be at least 1, got %s", block_size)
    require(
        all(size % block_size == 0 for size in weight.shape),
        "live_blocks: blocks of %s do not divide the weight's %s; choose a divisor or pad it",
        block_size,
        tuple(weight.shape),
    )


def _fake(weight: Tensor, block_size: int) -> Tensor:
    shape = [size // block_size for size in weight.shape]
    return torch.empty(shape, dtype=torch.bool, device=weight.device)


_op = Op("live_blocks(Tensor weight, SymInt block_size) -> Tensor", _check, _fake)
_op.no_gradient()


def _why_not_triton(weight: Tensor, block_size: int) -> str | None:
    if block_size not in _SIZES:
        return f"its blocks are 32, 64 or 128 wide, got {block_size}"
    reason = _compiled.why_not_dtype(
        weight, "weight", torch.bool, torch.bfloat16, torch.float16, torch.float32
    )
    if reason is None and os.environ.get("TRITON_INTERPRET") != "1":  # on the CPU, for the tests
        reason = why_not_triton(weight)
    return reason


@_op.implementation("triton", _why_not_triton)
def _triton(weight: Tensor, block_size: int) -> Tensor:
    from rtk.kernels import live_blocks as kernels

    out = _fake(weight, block_size)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(weight):  # Triton launches on the current device
        kernels.live_blocks[(out.numel(),)](
            weight.view(torch.int8) if weight.dtype == torch.bool else weight,
            out.view(torch.int8),
            out.shape[1],
            *weight.stride(),
            BLOCK=block_size,
            ROWS=kernels.ROWS,
        )
    return out


@_op.implementation("reference")
def _reference(weight: Tensor, block_size: int) -> Tensor:
    rows, columns = (size // block_size for size in weight.shape)
    blocks = (weight != 0).reshape(rows, block_size, columns, block_size)
    return blocks.any(3).any(1)
