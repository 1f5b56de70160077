"""The paths that a masked convolution can take, one for its forward and one for its input gradient.

"cudnn" multiplies by every weight. "skip" passes over blocks of 64 x 64 weights that are all zero
(`live_tiles`), "sparse" over every weight that is zero (`sparse_columns`); both read lists, which
are made on the GPU: of the prepared weight, and for the input gradient of the turned one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rtk.errors import check_choice
from rtk.ops.fused_conv2d import fused_conv2d, fused_conv2d_bwd_input, turn_filter
from rtk.ops.live_tiles import BLOCK, live_tiles
from rtk.ops.sparse_columns import TAPS, sparse_columns
from rtk.ops.sparse_conv2d import sparse_conv2d, sparse_conv2d_bwd_input

PATHS = ("cudnn", "skip", "sparse")
CUDNN = ("cudnn", "cudnn")


def why_not_path(
    path: str,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> str | None:
    """Return why a convolution cannot take `path`, or None where it can."""
    if path == "cudnn":
        return None
    check_choice("path", path, PATHS)
    taps = weight.shape[2]
    if groups != 1 or set(dilation) != {1}:
        return "it has groups or dilation"
    if weight.shape[3] != taps or stride[0] != stride[1] or padding[0] != padding[1]:
        return "filter, stride and padding must be the same both ways"
    if stride[0] > 2 or padding[0] >= taps:
        return "stride must be 1 or 2, padding less than the filter"
    if path == "skip" and weight.shape[1] > BLOCK**2:
        return f"it has more than {BLOCK**2} input channels"
    if path == "sparse" and taps > TAPS:
        return f"its filter is larger than {TAPS} x {TAPS}"
    return None


def lists_of(path: str, weights: Sequence[Tensor]) -> list[Tensor | None]:
    """Return what `path` reads beside each weight: prepared, or turned for the input gradient."""
    if path == "skip":
        return [live_tiles(weight) for weight in weights]
    if path == "sparse":
        return [*sparse_columns(weights)]
    return [None] * len(weights)


def takes(path: str, activations: Tensor) -> bool:
    """Whether `path` is one of ours, and takes these activations without a copy."""
    return (
        path != "cudnn"
        and activations.dtype == torch.bfloat16
        and activations.numel() > 0
        and activations.is_contiguous(memory_format=torch.channels_last)
    )


def forward(
    path: str,
    lists: Tensor | None,
    input: Tensor,
    prepared: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
) -> Tensor:
    """Convolve on a path that `takes` the input; lists None are made here."""
    if lists is None:
        [lists] = lists_of(path, [prepared])
    if path == "skip":
        return fused_conv2d(input, prepared, bias, live=lists, stride=stride, padding=padding)
    assert lists is not None
    return sparse_conv2d(input, lists, prepared.shape, bias, stride=stride, padding=padding)


def bwd_input(
    path: str,
    lists: Tensor | None,
    grad: Tensor,
    prepared: Tensor,
    turned: Tensor | None,
    input_size: Sequence[int],
    stride: int,
    padding: int,
) -> Tensor:
    """Return the gradient of an input (H, W) on a path that `takes` grad; see `forward`."""
    if lists is None or path == "skip":
        turned = turn_filter(prepared) if turned is None else turned
    if lists is None:
        assert turned is not None
        [lists] = lists_of(path, [turned])
    if path == "skip":
        assert turned is not None
        return fused_conv2d_bwd_input(
            grad, turned, input_size, live=lists, stride=stride, padding=padding
        )
    assert lists is not None
    k, c, r, s = prepared.shape
    return sparse_conv2d_bwd_input(
        grad, lists, (c, k, r, s), input_size, stride=stride, padding=padding
    )
