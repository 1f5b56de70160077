"""The output of `fused_conv2d`: its size, its shape and its memory, which all backends share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rtk.ops.positive_bits import empty_bits

_LAST = torch.channels_last


def natural_size(
    input: Tensor, weight: Tensor, stride: int, padding: int, upsample: int
) -> list[int]:
    """Return [OH, OW] of the convolution that is neither cropped nor made larger."""
    return [
        ((size - 1) * upsample + 1 + 2 * padding - taps) // stride + 1
        for size, taps in zip(input.shape[2:], weight.shape[2:], strict=True)
    ]


def output_shape(
    input: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    upsample: int,
    out_size: Sequence[int] | None,
) -> list[int]:
    """Return [N, K, OH, OW]."""
    size = natural_size(input, weight, stride, padding, upsample) if out_size is None else out_size
    return [input.shape[0], weight.shape[0], *size]


def empty_output(
    input: Tensor,
    weight: Tensor,
    *_: Tensor | None,
    stride: int,
    padding: int,
    upsample: int,
    out_size: Sequence[int] | None,
    **__: object,
) -> Tensor:
    """Allocate the output, channels_last, of the op's arguments."""
    shape = output_shape(input, weight, stride, padding, upsample, out_size)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=_LAST)


def empty_positive(out: Tensor, save_positive: bool) -> Tensor:
    """Allocate the op's second result: the bits of `out`, or a tensor of no elements."""
    if save_positive:
        return empty_bits(out)
    return torch.empty(0, dtype=torch.int16, device=out.device)
