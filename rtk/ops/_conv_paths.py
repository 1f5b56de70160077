"""The paths that a masked convolution can take: its forward, its input and its weight gradient.

"cudnn" multiplies by every weight. "skip" passes over blocks of 64 x 64 weights that are all zero
(`live_tiles`), "sparse" over every weight that is zero (`sparse_columns`); both read lists, which
are made on the GPU: of the prepared weight, and for the input gradient of the turned one. The
weight gradient can skip, by the words of the mask: a weight that is zero but kept has a gradient.
Those words serve the forward as well, as they name every block that is not zero.

A 1x1 filter that visits every pixel is a matrix, and in channels_last an image's pixels are rows:
"blocks32", "blocks64" and "blocks128" are `block_matmul` of them, all three ways by `live_blocks`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rtk.errors import check_choice
from rtk.ops import _block_paths
from rtk.ops._block_paths import BLOCK_PATHS, blocks_of, why_not_blocks
from rtk.ops._fused_conv2d_cuda import DENSITY
from rtk.ops._layout import memory_format
from rtk.ops.conv2d_bwd_weight import conv2d_bwd_weight_live
from rtk.ops.fused_conv2d import fused_conv2d, fused_conv2d_bwd_input, turn_filter
from rtk.ops.live_tiles import BLOCK, live_tiles
from rtk.ops.sparse_columns import TAPS, sparse_columns
from rtk.ops.sparse_conv2d import sparse_conv2d, sparse_conv2d_bwd_input

PATHS = ("cudnn", "skip", "sparse", *BLOCK_PATHS)
BWD_WEIGHT_PATHS = ("cudnn", "skip", *BLOCK_PATHS)

# Of the forward, the input gradient and the weight gradient, in this order.
CUDNN = ("cudnn", "cudnn", "cudnn")
NO_LISTS = (None, None, None)
DENSITIES = (DENSITY, DENSITY, DENSITY)


def why_not_path(
    path: str,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> str | None:
    """Return why a convolution and its input gradient cannot take `path`, None where they can."""
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
    if path in BLOCK_PATHS:
        if taps != 1 or stride[0] != 1:
            return "it is for 1x1 filters of stride 1"
        return why_not_blocks(path, *weight.shape[:2])
    return None


def why_not_bwd_weight_path(
    path: str,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> str | None:
    """Return why a weight gradient cannot take `path`, or None where it can."""
    check_choice("path of the weight gradient", path, BWD_WEIGHT_PATHS)
    if path in BLOCK_PATHS:
        return why_not_path(path, weight, stride, padding, dilation, groups)
    if path == "skip" and groups != 1:
        return "it has groups"
    if path == "skip" and weight.shape[1] > BLOCK**2:
        return f"it has more than {BLOCK**2} input channels"
    return None


def reads_turned(path: str, way: int) -> bool:
    """Whether the lists of a way (0 forward, 1 input gradient, 2 weight gradient) are of `turned`.

    Others are of the weight, or of its mask in its shape.
    """
    return way == 1 and path not in BLOCK_PATHS


def lists_of(path: str, weights: Sequence[Tensor]) -> list[Tensor | None]:
    """Return what `path` reads beside each weight.

    That is the prepared weight, for the input gradient the turned one (but see `reads_turned`), and
    for the weight gradient the `whole_mask`.
    """
    if path in BLOCK_PATHS:
        return [blocks_of(path, weight) for weight in weights]
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


def whole_mask(weight: Tensor, mask: Tensor) -> Tensor:
    """Return a mask of the weight's shape; nothing is copied."""
    return mask.expand(weight.shape)


def takes_bwd_weight(
    path: str, grad: Tensor, input: Tensor, weight: Tensor, mask: Tensor, need_mask: bool
) -> bool:
    """Whether the weight gradient skips: these activations, into this weight, without a copy."""
    return (
        takes(path, input)
        and takes(path, grad)
        and mask.dtype == torch.bool
        and not need_mask  # which is made of the dense gradient
        and weight.dtype == torch.float32
        and weight.is_contiguous(memory_format=torch.channels_last)
    )


def forward(
    path: str,
    lists: Tensor | None,
    input: Tensor,
    prepared: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    density: float = DENSITY,
) -> Tensor:
    """Convolve on a path that `takes` the input; lists None are made here.

    `density` is the share of blocks that are alive, as far as it is known.
    """
    if lists is None:
        [lists] = lists_of(path, [prepared])
    if path in BLOCK_PATHS:
        assert lists is not None
        out = _block_paths.multiply(path, lists, _pixels(input), prepared.flatten(1), density)
        return _images(out if bias is None else out.add_(bias))
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
    density: float = DENSITY,
) -> Tensor:
    """Return the gradient of an input (H, W) on a path that `takes` grad; see `forward`."""
    if path in BLOCK_PATHS:
        blocks = blocks_of(path, prepared) if lists is None else lists
        given = _pixels(grad), prepared.flatten(1), density
        return _images(_block_paths.bwd_input(path, blocks, *given))
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


def bwd_weight(
    path: str,
    lists: Tensor | None,
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    density: float = DENSITY,
) -> Tensor:
    """Return the weight's gradient in its own format, masked; only live blocks are computed."""
    if lists is None:
        [lists] = lists_of(path, [whole_mask(weight, mask)])
    assert lists is not None
    if path in BLOCK_PATHS:
        matrices = weight.flatten(1), whole_mask(weight, mask).flatten(1)
        given = _pixels(grad), _pixels(input), *matrices, density
        return _block_paths.bwd_weight(path, lists, *given).view(weight.shape)
    return conv2d_bwd_weight_live(
        grad,
        input,
        lists,
        weight.shape,
        stride,
        padding,
        dilation,
        mask=mask,
        channels_last=memory_format(weight) == torch.channels_last,
        density=density,
    )


def _pixels(images: Tensor) -> Tensor:
    """Return (N, C, H, W) as (N, H, W, C)."""
    return images.permute(0, 2, 3, 1)


def _images(pixels: Tensor) -> Tensor:
    """Undo `_pixels` for a fresh tensor.

    Autograd must not see a view in it: one that a custom function returns must not be changed in
    place, and an activation that follows may do so.
    """
    return pixels.permute(0, 3, 1, 2).data
