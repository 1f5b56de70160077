"""sparse_conv2d: a convolution that multiplies only by the weights that are not zero.

N C H W input, K output channels, R S filter, OH OW output. For very sparse weights without any
structure (97 % zeros and up), and for others whose live columns are few: see `sparse_columns`. It
is a building block of `masked_conv2d`, so it has no gradient itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rtk.ops import _compiled
from rtk.ops._registry import Op, require
from rtk.ops.sparse_columns import TAPS, dense_weight, lists_shape

_LAST = torch.channels_last


def sparse_conv2d(
    input: Tensor,
    columns: Tensor,
    size: Sequence[int],
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    upsample: int = 1,
    out_size: Sequence[int] | None = None,
) -> Tensor:
    """Convolve by lists: `F.conv2d(input, weight, bias, stride, padding)`, summed in fp32.

    Args:
        input: (N, C, H, W), bf16. A memory format other than channels_last costs a copy.
        columns: `sparse_columns(weight)`, of any density: what is denser is slower, not wrong.
        size: (K, C, R, S) of that weight.
        bias: (K,), fp32 or bf16, or None.
        stride: at least 1; the GPU's kernel takes 1 and 2.
        padding: zeros around the (upsampled) input, at least 0.
        upsample: 1, or 2: zeros stand between the input's pixels, as for `fused_conv2d`; then the
            stride is 1.
        out_size: (OH, OW): the output is cropped to it, or under upsample=2 one larger where that
            is asked for. None is the natural size.

    Returns:
        (N, K, OH, OW), bf16, channels_last; it does not require grad.

    Raises:
        RtkError: if shapes, dtypes or devices do not fit.
    """
    return _op(input, columns, size, bias, stride, padding, upsample, out_size)


def sparse_conv2d_bwd_input(
    grad: Tensor,
    columns: Tensor,
    size: Sequence[int],
    input_size: Sequence[int],
    *,
    stride: int = 1,
    padding: int = 0,
) -> Tensor:
    """Return the input gradient of `conv2d(x, weight, stride=stride, padding=padding)`.

    Args:
        grad: (N, K, OH, OW), bf16, the gradient of the convolution's output.
        columns: `sparse_columns(turn_filter(weight))`.
        size: (C, K, R, R) of the turned weight.
        input_size: (H, W) of x.
        stride, padding: the forward convolution's: 1 or 2, and 0 to R - 1.

    Returns:
        (N, C, H, W), bf16, channels_last.

    Raises:
        RtkError: if something does not fit; for a filter that is not square.
    """
    require(
        len(size) == 4 and size[2] == size[3],
        "sparse_conv2d_bwd_input: size must be (C, K, R, R), got %s",
        tuple(size),
    )
    require(
        0 <= padding < size[2],
        "sparse_conv2d_bwd_input: padding must be 0 to R - 1 = %s, got %s",
        size[2] - 1,
        padding,
    )
    return sparse_conv2d(
        grad,
        columns,
        size,
        upsample=stride,
        padding=size[2] - 1 - padding,
        out_size=input_size,
    )


def _natural_size(
    input: Tensor, size: Sequence[int], stride: int, padding: int, upsample: int
) -> list[int]:
    return [
        ((pixels - 1) * upsample + 1 + 2 * padding - taps) // stride + 1
        for pixels, taps in zip(input.shape[2:], size[2:], strict=True)
    ]


def _check(
    input: Tensor,
    columns: Tensor,
    size: Sequence[int],
    bias: Tensor | None,
    stride: int,
    padding: int,
    upsample: int,
    out_size: Sequence[int] | None,
) -> None:
    require(
        len(size) == 4 and min(size) > 0 and max(size[2:]) <= TAPS,
        "sparse_conv2d: size must be (K, C, R, S), none of them 0, R and S at most 3, got %s",
        tuple(size),
    )
    require(
        input.dim() == 4 and min(input.shape[1:]) > 0 and input.shape[1] == size[1],
        "sparse_conv2d: input must be (N, C, H, W) with C = %s, H and W not 0, got %s",
        size[1],
        tuple(input.shape),
    )
    require(
        input.dtype == torch.bfloat16,
        "sparse_conv2d: input must be torch.bfloat16, got %s",
        input.dtype,
    )
    require(
        tuple(columns.shape) == lists_shape(size) and columns.dtype == torch.int32,
        "sparse_conv2d: columns must be %s torch.int32 for a weight of %s, got %s %s; make it with "
        "sparse_columns(weight)",
        lists_shape(size),
        tuple(size),
        tuple(columns.shape),
        columns.dtype,
    )
    require(
        bias is None
        or (bias.shape == (size[0],) and bias.dtype in (torch.float32, torch.bfloat16)),
        "sparse_conv2d: bias must be (K,) = (%s,), fp32 or bf16, got %s",
        size[0],
        None if bias is None else (tuple(bias.shape), bias.dtype),
    )
    for name, tensor in (("columns", columns), ("bias", bias)):
        require(
            tensor is None or tensor.device == input.device,
            "sparse_conv2d: input is on %s and %s on %s; move one with .to()",
            input.device,
            name,
            None if tensor is None else tensor.device,
        )
    require(stride >= 1, "sparse_conv2d: stride must be at least 1, got %s", stride)
    require(padding >= 0, "sparse_conv2d: padding must be at least 0, got %s", padding)
    require(
        upsample == 1 or (upsample == 2 and stride == 1),
        "sparse_conv2d: upsample must be 1, or 2 with stride 1, got %s with stride %s",
        upsample,
        stride,
    )
    natural = _natural_size(input, size, stride, padding, upsample)
    out = natural if out_size is None else list(out_size)
    require(
        len(out) == 2 and min(out) >= 1,
        "sparse_conv2d: the output must be at least 1 x 1, got %s; is the filter larger than the "
        "padded input?",
        tuple(out),
    )
    require(
        all(o <= n + upsample - 1 for o, n in zip(out, natural, strict=True)),
        "sparse_conv2d: out_size is at most %s here, got %s",
        tuple(n + upsample - 1 for n in natural),
        tuple(out),
    )


def _empty_output(
    input: Tensor,
    columns: Tensor,
    size: Sequence[int],
    bias: Tensor | None,
    stride: int,
    padding: int,
    upsample: int,
    out_size: Sequence[int] | None,
) -> Tensor:
    natural = _natural_size(input, size, stride, padding, upsample)
    shape = [input.shape[0], size[0], *(natural if out_size is None else out_size)]
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=_LAST)


_op = Op(
    "sparse_conv2d(Tensor input, Tensor columns, SymInt[] size, Tensor? bias, SymInt stride, "
    "SymInt padding, SymInt upsample, SymInt[]? out_size) -> Tensor",
    _check,
    _empty_output,
)
_op.no_gradient()


def _why_not_cuda(
    input: Tensor,
    columns: Tensor,
    size: Sequence[int],
    bias: Tensor | None,
    stride: int,
    *_: object,
) -> str | None:
    reason = _compiled.why_not_cuda(input)
    if reason is not None:
        return reason
    if torch.cuda.get_device_capability(input.device) != (9, 0):
        return "its tiles are laid out for the shared memory of compute capability 9.0"
    if size[0] % 8 or size[1] % 8:
        return "it takes channels in multiples of 8"
    if stride > 2:
        return "it takes stride 1 and 2"
    if input.shape[1:].numel() >= 2**31:
        return "it counts within an image in 32 bits"
    return None


@_op.implementation("cuda", _why_not_cuda)
def _cuda(
    input: Tensor,
    columns: Tensor,
    size: Sequence[int],
    bias: Tensor | None,
    stride: int,
    padding: int,
    upsample: int,
    out_size: Sequence[int] | None,
) -> Tensor:
    out = _empty_output(input, columns, size, bias, stride, padding, upsample, out_size)
    if out.numel() == 0:
        return out
    input = _aligned(input.contiguous(memory_format=_LAST))
    columns = _aligned(columns.contiguous())
    bias = None if bias is None else bias.float().contiguous()
    n, c, h, w = input.shape
    k, _, r, s = size
    _compiled._C.sparse_conv2d_cuda(
        input.data_ptr(),
        columns.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        [n, h, w, c, k, r, s, *out.shape[2:]],
        stride,
        padding,
        upsample,
        input.device.index,
        torch.cuda.current_stream(input.device).cuda_stream,
    )
    return out


def _aligned(tensor: Tensor) -> Tensor:
    """Return it at a multiple of 16 bytes, as the kernel reads; only odd views are copied."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


@_op.implementation("reference")
def _reference(
    input: Tensor,
    columns: Tensor,
    size: Sequence[int],
    bias: Tensor | None,
    stride: int,
    padding: int,
    upsample: int,
    out_size: Sequence[int] | None,
) -> Tensor:
    out = _empty_output(input, columns, size, bias, stride, padding, upsample, out_size)
    if out.numel() == 0:
        return out
    x = input.float()
    if upsample == 2:
        n, c, h, w = x.shape
        x = x.new_zeros(n, c, 2 * h - 1, 2 * w - 1)
        x[:, :, ::2, ::2] = input
    # The last row and column that the last output pixel sees: what F.pad adds or cuts off.
    below, right = (
        (pixels - 1) * stride + taps - padding - given
        for pixels, taps, given in zip(out.shape[2:], size[2:], x.shape[2:], strict=True)
    )
    padded = F.pad(x, (padding, right, padding, below))
    bias = None if bias is None else bias.float()
    return out.copy_(F.conv2d(padded, dense_weight(columns, size), bias, stride))
