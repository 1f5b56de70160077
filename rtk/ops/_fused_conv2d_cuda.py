"""The CUDA backend of `fused_conv2d`, for Hopper GPUs: what it takes, and its kernel's call."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rtk.ops import _compiled
from rtk.ops._conv_output import empty_output, empty_positive
from rtk.ops._conv_tiles import Problem, Tile, pick

_LAST = torch.channels_last
DENSITY = 0.25  # of live blocks, where the caller does not know


def why_not_cuda(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    live: Tensor | None = None,
    *,
    relu: bool,
    stride: int,
    upsample: int,
    residual_stride: int,
    **_: object,
) -> str | None:
    """Return why the kernel cannot take these arguments, or None if it can."""
    reason = _compiled.why_not_cuda(input) or _compiled.why_not_dtype(
        input, "input", torch.bfloat16
    )
    if reason is not None:
        return reason
    if torch.cuda.get_device_capability(input.device) != (9, 0):
        return "its instructions are those of compute capability 9.0"
    if input.shape[1] % 8 or weight.shape[0] % 64:
        return "it takes input channels in multiples of 8, output channels in multiples of 64"
    if weight.shape[2] != weight.shape[3] or weight.shape[2] > 3:
        return "it takes square filters of up to 3x3"
    if gate is not None and (gate.dtype != torch.int16 or bias is not None or relu):
        return "it takes a gate of bits, without bias and ReLU"
    if residual is not None and residual_stride == 2 and stride > 1:
        return "it takes a residual at every second pixel only with stride 1"
    return None


def problem_of(
    input: Tensor,
    weight: Tensor,
    out: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    live: Tensor | None = None,
    *,
    density: float = DENSITY,
    **options: Any,
) -> Problem:
    """Return what a tile is chosen by for these arguments of the op."""
    return Problem(
        n=input.shape[0],
        c=input.shape[1],
        k=weight.shape[0],
        r=weight.shape[2],
        out_h=out.shape[2],
        out_w=out.shape[3],
        stride=options["stride"],
        padding=options["padding"],
        upsample=options["upsample"],
        residual_stride=0 if residual is None else options["residual_stride"],
        gated=gate is not None,
        live_log2=None if live is None else round(math.log2(max(density, 2.0**-6))),
    )


def run_cuda(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    live: Tensor | None = None,
    *,
    save_positive: bool,
    tile: Tile | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Run csrc/cuda/fused_conv2d.cu, with the tile that is known to be fastest or with `tile`."""
    out = empty_output(input, weight, **options)
    positive = empty_positive(out, save_positive)
    if out.numel() == 0:
        return out, positive
    input, weight = (t.contiguous(memory_format=_LAST) for t in (input, weight))
    residual = None if residual is None else residual.contiguous(memory_format=_LAST)
    bias, gate, live = (None if t is None else t.contiguous() for t in (bias, gate, live))
    bias = None if bias is None else bias.float()

    def address(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    n, c, h, w = input.shape
    k, _, r, s = weight.shape
    arguments = (
        *map(address, (input, weight, bias, residual, gate, live, out)),
        positive.data_ptr() if save_positive else 0,
        [n, h, w, c, k, r, s, *out.shape[2:]],
        *(options[name] for name in ("stride", "padding", "upsample", "residual_stride", "relu")),
    )
    device, stream = input.device.index, torch.cuda.current_stream(input.device).cuda_stream

    def run(tile: Tile) -> None:
        _compiled._C.fused_conv2d_cuda(*arguments, tile.arguments, device, stream)

    def fits(tile: Tile) -> bool:
        return _compiled._C.fused_conv2d_fits(*arguments, tile.arguments)

    if tile is None:
        problem = problem_of(input, weight, out, residual, gate, live, **options)
        tile = pick(device, problem, run, fits)
    run(tile)
    return out, positive
