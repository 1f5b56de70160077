"""live_tiles: which 64 x 64 blocks of a convolution's weight have anything to multiply.

K output channels, C input channels, R S filter. A block is one tap (r, s) of 64 output and 64 input
channels. Made on the device whenever the mask changes, of a size that does not depend on it, so a
captured graph follows a mask that is updated in place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rtk.ops import _compiled
from rtk.ops._registry import Op, require
from rtk.ops.prepare_weight import FLOATS

BLOCK = 64  # channels of a block, both ways
_BITS = 64  # of a word: chunks of input channels


def live_tiles(weight: Tensor) -> Tensor:
    """Return the words by which `fused_conv2d` skips blocks of weights that are all zero.

    Bit j of word (i, r * S + s) is on where any of weight[64 i : 64 i + 64, 64 j : 64 j + 64, r, s]
    is not 0. For the input gradient, ask with the turned weight (`turn_filter`).

    Args:
        weight: (K, C, R, S), the prepared weight (floating; NaN is not 0, -0 is) or its mask
            (bool), of any strides; C at most 4096.

    Returns:
        (ceil(K / 64), R * S) int64, dense, bit 63 being the sign; it does not require grad.

    Raises:
        RtkError: if the shape or the dtype does not fit.
    """
    return _op(weight)


def check_words(op: str, live: Tensor, weight: Tensor) -> None:
    """Raise an RtkError unless `live` can be the words of `weight` (K, C, R, S)."""
    shape = _words_shape(weight)
    require(
        tuple(live.shape) == shape and live.dtype == torch.int64,
        "%s: live must be (ceil(K / 64), R * S) = %s torch.int64, got %s %s; make it with "
        "live_tiles(weight)",
        op,
        shape,
        tuple(live.shape),
        live.dtype,
    )
    require(
        live.device == weight.device,
        "%s: live is on %s and weight on %s; move one with .to()",
        op,
        live.device,
        weight.device,
    )
    _check_chunks(op, weight)


def _words_shape(weight: Tensor) -> tuple[int, int]:
    k, _, r, s = weight.shape
    return -(-k // BLOCK), r * s


def _check_chunks(op: str, weight: Tensor) -> None:
    require(
        weight.shape[1] <= BLOCK * _BITS,
        "%s: a live word is for at most %s input channels, got %s",
        op,
        BLOCK * _BITS,
        weight.shape[1],
    )


def _check(weight: Tensor) -> None:
    require(
        weight.dtype == torch.bool or weight.dtype in FLOATS,
        "live_tiles: weight must be floating, or a bool mask, got %s; use mask.bool()",
        weight.dtype,
    )
    require(
        weight.dim() == 4 and min(weight.shape) > 0,
        "live_tiles: weight must be (K, C, R, S), none of them 0, got %s",
        tuple(weight.shape),
    )
    _check_chunks("live_tiles", weight)


def _fake(weight: Tensor) -> Tensor:
    return torch.empty(_words_shape(weight), dtype=torch.int64, device=weight.device)


_op = Op("live_tiles(Tensor weight) -> Tensor", _check, _fake)
_op.no_gradient()


@_op.implementation("cuda", _compiled.why_not_cuda)
def _cuda(weight: Tensor) -> Tensor:
    words = _fake(weight)
    # A 1x1 filter has strides of no meaning along it, which must not hinder 16-byte loads.
    strides = [
        step if size > 1 else 0 for size, step in zip(weight.shape, weight.stride(), strict=True)
    ]
    stream = torch.cuda.current_stream(weight.device).cuda_stream
    _compiled._C.live_tiles_cuda(
        weight.data_ptr(),
        _compiled.DTYPES[weight.dtype],
        list(weight.shape),
        strides,
        words.data_ptr(),
        weight.device.index,
        stream,
    )
    return words


@_op.implementation("reference")
def _reference(weight: Tensor) -> Tensor:
    k, c = weight.shape[:2]
    padded = F.pad(weight != 0, (0, 0, 0, 0, 0, -c % BLOCK, 0, -k % BLOCK))
    live = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).any(3).any(1)
    bit = torch.ones((), dtype=torch.int64, device=weight.device) << torch.arange(
        live.shape[1], device=weight.device
    )
    # Bits that differ add up as they would be or-ed, the sign included.
    return (live.flatten(2) * bit[:, None]).sum(1)
