"""conv2d_bwd_weight_live: a convolution's weight gradient, of live blocks only, masked, in fp32.

N C H W input, K output channels, R S filter, OH OW output. For training a ticket whose dead weights
stay dead: what is dead is neither computed nor written but as 0, and the dense gradient is never in
memory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rtk.ops import _compiled
from rtk.ops._fused_conv2d_cuda import DENSITY
from rtk.ops._layout import broadcasts_to
from rtk.ops._registry import Op, require
from rtk.ops._triton import why_not_triton
from rtk.ops.live_tiles import BLOCK
from rtk.ops.prepare_weight import FLOATS, apply_mask

IntPair = int | Sequence[int]

_LAST = torch.channels_last
_MOST = 8192  # blocks of a row, and words, that one program of the Triton kernel numbers


def conv2d_bwd_weight_live(
    grad: Tensor,
    input: Tensor,
    live: Tensor,
    weight_size: Sequence[int],
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    *,
    mask: Tensor | None = None,
    channels_last: bool = True,
    density: float = DENSITY,
) -> Tensor:
    """Return the weight gradient of `conv2d(input, w)` where w lives, and exactly 0 elsewhere.

        out[k, c, r, s] = mask[k, c, r, s] * sum over n, oh, ow of
            grad[n, k, oh, ow] * input[n, c, oh * stride + r * dilation - padding, likewise w]

    in the blocks of 64 x 64 channels of a tap whose bit in `live` is on. Sums are in fp32 (fp64 for
    fp64 tensors) and never rounded to less; the same arguments give the same bits.

    Args:
        grad: (N, K, OH, OW), the gradient of the convolution's output, the input's dtype. Here and
            for the input, a memory format other than channels_last costs a copy.
        input: (N, C, H, W), floating; bf16 and fp16 are what the GPU kernel takes.
        live: (ceil(K / 64), R * S) int64, `live_tiles` of the weight or of its mask.
        weight_size: (K, C, R, S).
        stride, padding, dilation: the convolution's; an int or a pair (along H, along W).
        mask: bool, or floating (it scales); broadcasts to (K, C, R, S). None is all True.
        channels_last: lay the result out as K, R, S, C, which is the faster one, not K, C, R, S.
        density: the share of bits of `live` that are on, 0 to 1, as far as it is known without
            asking the GPU. It decides only how the work is cut up.

    Returns:
        (K, C, R, S), fp32 (fp64 for fp64 tensors); it does not require grad. Dead blocks, and what
        a bool mask prunes, are +0 even where the gradient would be infinite or NaN.

    Raises:
        RtkError: if shapes, dtypes or devices do not fit.
    """
    return _op(
        grad,
        input,
        live,
        weight_size,
        _pair("stride", stride),
        _pair("padding", padding),
        _pair("dilation", dilation),
        mask,
        channels_last,
        density,
    )


def _pair(name: str, value: IntPair) -> list[int]:
    if isinstance(value, Sequence):
        require(
            len(value) == 2,
            "conv2d_bwd_weight_live: %s must be an int or a pair, got %s",
            name,
            value,
        )
        return list(value)
    return [value, value]


def _check(
    grad: Tensor,
    input: Tensor,
    live: Tensor,
    weight_size: Sequence[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    mask: Tensor | None,
    channels_last: bool,
    density: float,
) -> None:
    op = "conv2d_bwd_weight_live"
    require(input.dtype in FLOATS, "%s: input must be floating, got %s", op, input.dtype)
    require(
        input.dim() == 4 and min(input.shape[1:]) > 0,
        "%s: input must be (N, C, H, W), none of the last three 0, got %s",
        op,
        tuple(input.shape),
    )
    require(
        len(weight_size) == 4 and min(weight_size) > 0 and weight_size[1] == input.shape[1],
        "%s: weight_size must be (K, C, R, S), none of them 0, with the input's C = %s, got %s",
        op,
        input.shape[1],
        tuple(weight_size),
    )
    require(min(stride) >= 1, "%s: stride must be at least 1, got %s", op, stride)
    require(min(padding) >= 0, "%s: padding must be at least 0, got %s", op, padding)
    require(min(dilation) >= 1, "%s: dilation must be at least 1, got %s", op, dilation)
    require(0 <= density <= 1, "%s: density must be 0 to 1, got %s", op, density)
    k, c, *taps = weight_size
    size = [
        (pixels + 2 * pad - step * (tap - 1) - 1) // by + 1
        for pixels, tap, by, pad, step in zip(
            input.shape[2:], taps, stride, padding, dilation, strict=True
        )
    ]
    require(
        min(size) >= 1,
        "%s: the output must be at least 1 x 1, got %s; is the filter larger than the padded "
        "input?",
        op,
        tuple(size),
    )
    require(
        tuple(grad.shape) == (input.shape[0], k, *size) and grad.dtype == input.dtype,
        "%s: grad must be (N, K, OH, OW) = %s in the input's %s, got %s in %s",
        op,
        (input.shape[0], k, *size),
        input.dtype,
        tuple(grad.shape),
        grad.dtype,
    )
    require(
        c <= BLOCK * 64,
        "%s: a live word is for at most %s input channels, got %s",
        op,
        BLOCK * 64,
        c,
    )
    words = (-(-k // BLOCK), taps[0] * taps[1])
    require(
        tuple(live.shape) == words and live.dtype == torch.int64,
        "%s: live must be (ceil(K / 64), R * S) = %s torch.int64, got %s %s; make it with "
        "live_tiles(weight)",
        op,
        words,
        tuple(live.shape),
        live.dtype,
    )
    if mask is not None:
        require(
            mask.dtype == torch.bool or mask.dtype in FLOATS,
            "%s: mask must be bool or floating, got %s; use mask.bool()",
            op,
            mask.dtype,
        )
        require(
            broadcasts_to(mask.shape, torch.Size(weight_size)),
            "%s: mask must broadcast to (K, C, R, S) = %s, got %s",
            op,
            tuple(weight_size),
            tuple(mask.shape),
        )
    for name, tensor in (("grad", grad), ("live", live), ("mask", mask)):
        require(
            tensor is None or tensor.device == input.device,
            "%s: input is on %s and %s on %s; move one with .to()",
            op,
            input.device,
            name,
            None if tensor is None else tensor.device,
        )


def _fake(
    grad: Tensor,
    input: Tensor,
    live: Tensor,
    weight_size: Sequence[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    mask: Tensor | None,
    channels_last: bool,
    density: float,
) -> Tensor:
    return torch.empty(
        weight_size,
        dtype=torch.promote_types(input.dtype, torch.float32),
        device=input.device,
        memory_format=_LAST if channels_last else torch.contiguous_format,
    )


_op = Op(
    "conv2d_bwd_weight_live(Tensor grad, Tensor input, Tensor live, SymInt[] weight_size, "
    "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, Tensor? mask, bool channels_last, "
    "float density) -> Tensor",
    _check,
    _fake,
)
_op.no_gradient()


def _why_not_triton(
    grad: Tensor,
    input: Tensor,
    live: Tensor,
    weight_size: Sequence[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    mask: Tensor | None,
    *_: object,
) -> str | None:
    k, c, r, s = weight_size
    if max(grad.numel(), input.numel()) >= 2**31 - 2**10:
        return "it counts the elements of grad and input in 32 bits"
    if mask is not None and mask.dtype == torch.float64:
        return "mask is torch.float64"
    rows, taps, blocks = -(-k // BLOCK), r * s, r * s * -(-c // BLOCK)
    if max(rows * taps, blocks) > _MOST:
        return f"it numbers at most {_MOST} blocks"
    if os.environ.get("TRITON_INTERPRET") == "1":
        # On the CPU, for the tests; its bf16 product is wrong.
        return _compiled.why_not_dtype(input, "input", torch.float32)
    reason = why_not_triton(input) or _compiled.why_not_dtype(
        input, "input", torch.bfloat16, torch.float16
    )
    if reason is None and (k % 8 or c % 8):
        reason = f"K and C must be multiples of 8, the 16 bytes of a copy, got {k} and {c}"
    if reason is None and torch.cuda.get_device_capability(input.device) < (8, 0):
        reason = "its product needs a GPU of compute capability 8.0 or more"
    return reason


@_op.implementation("triton", _why_not_triton)
def _triton(
    grad: Tensor,
    input: Tensor,
    live: Tensor,
    weight_size: Sequence[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    mask: Tensor | None,
    channels_last: bool,
    density: float,
    config: Any = None,
) -> Tensor:
    """Run `rtk.kernels.conv2d_bwd_weight`; `config` is one of its CONFIGS, given to time it."""
    from rtk.kernels.conv2d_bwd_weight import launch

    out = _fake(
        grad,
        input,
        live,
        weight_size,
        stride,
        padding,
        dilation,
        mask,
        channels_last,
        density,
    )
    if input.shape[0] == 0:
        return out.zero_()
    launch(
        grad.contiguous(memory_format=_LAST),
        input.contiguous(memory_format=_LAST),
        live.contiguous(),
        None if mask is None else mask.expand(out.shape),
        out,
        stride=stride,
        padding=padding,
        dilation=dilation,
        density=density,
        config=config,
    )
    return out


def _expand(live: Tensor, weight_size: Sequence[int]) -> Tensor:
    """Return (K, C, R, S) bool: whether the element lies in a live block."""
    k, c, r, s = weight_size
    chunk = torch.arange(-(-c // BLOCK), device=live.device)
    bits = ((live[..., None] >> chunk) & 1).bool().transpose(1, 2)
    elements = bits.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return elements[:k, :c].reshape(k, c, r, s)


@_op.implementation("reference")
def _reference(
    grad: Tensor,
    input: Tensor,
    live: Tensor,
    weight_size: Sequence[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    mask: Tensor | None,
    channels_last: bool,
    density: float,
) -> Tensor:
    out = _fake(
        grad,
        input,
        live,
        weight_size,
        stride,
        padding,
        dilation,
        mask,
        channels_last,
        density,
    )
    if input.shape[0] == 0:
        return out.zero_()
    dense = torch.ops.aten.convolution_backward(
        grad.to(out.dtype),
        input.to(out.dtype),
        out,  # only its sizes count
        None,
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        1,
        [False, True, False],
    )[1]
    if mask is not None:
        dense = apply_mask(dense, mask if mask.dtype == torch.bool else mask.to(out.dtype))
    return out.copy_(apply_mask(dense, _expand(live, weight_size)))
