"""stem_conv2d: a ResNet's first convolution for inference, images to activations in one pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from rtk.ops import _compiled
from rtk.ops._conv_output import empty_positive
from rtk.ops._registry import Op, require
from rtk.ops.positive_bits import pack_positive

_BF16 = torch.bfloat16
_LAST = torch.channels_last
_POOL = 3  # the max-pool's window; its stride is 2 and its padding 1


def stem_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    stride: int,
    padding: int,
    pool: bool,
    save_positive: bool = False,
) -> Any:
    """Normalise images, convolve, add the bias, apply ReLU and, with `pool`, max-pool.

    relu(conv2d(bf16((x - mean) / std), bf16(weight)) + bias), summed in fp32, rounded to bf16, and
    pooled 3x3 with stride 2 and padding 1. Zeros are padded after the normalisation, as a model
    does that normalises first. Batch norm is to be folded into `weight` and `bias` (its evaluation
    mode is affine). A CUDA kernel serves the stems of ResNets (He et al. 2016, arXiv 1512.03385):
    7x7 / 2 with pool and 3x3 / 1 without, for K a multiple of 8 up to 64.

    Args:
        x: (N, 3, H, W) images in [0, 1], fp32 or bf16.
        weight: (K, 3, R, S) fp32.
        bias: (K,) fp32.
        mean: (3,) fp32, the channels' mean in [0, 1] pixel scale.
        std: (3,) fp32, the channels' standard deviation in the same scale.
        stride: of the convolution, in pixels, both ways.
        padding: of the convolution, in pixels, on every side.
        pool: whether the max-pool follows.
        save_positive: also return `pack_positive(out)`, what gates the gradient on its way back.

    Returns:
        (out, index), or (out, index, positive). out: (N, K, H', W') bf16 and channels_last. index,
        with `pool`: like out, uint8, where in its window (0 to 8, row by row) the maximum lies that
        `out` holds, the first one among equals; without `pool`: (0,) uint8. positive: (N, H', W',
        4 ceil(K / 64)) int16.
        None requires grad; stem_conv2d_bwd_input gives the gradient in `x`.

    Raises:
        RtkError: if shapes, dtypes or devices do not fit, or the filter is larger than the image.
    """
    out, index, positive = _op(
        x,
        weight,
        bias,
        mean,
        std,
        stride=stride,
        padding=padding,
        pool=pool,
        save_positive=save_positive,
    )
    return (out, index, positive) if save_positive else (out, index)


def stem_conv2d_bwd_input(
    grad: Tensor,
    index: Tensor,
    weight: Tensor,
    std: Tensor,
    *,
    input_size: tuple[int, int, int, int] | torch.Size,
    stride: int,
    padding: int,
    pool: bool,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Tensor:
    """Return the gradient of `stem_conv2d` in its images.

    The gradient of a pooled value goes to its maximum; the sum (in fp32) of what meets there is
    rounded to bf16, as the activations' gradient is in a model in bf16, and goes through the
    transposed convolution with bf16(weight), summed in fp32, and the division by `std`.

    Args:
        grad: (N, K, H', W') bf16, the gradient of `out`, already times (out > 0).
        index: what stem_conv2d returned beside `out`.
        weight: (K, 3, R, S) fp32, as in the forward.
        std: (3,) fp32, as in the forward.
        input_size: (N, 3, H, W), the images' shape.
        stride: as in the forward.
        padding: as in the forward.
        pool: as in the forward.
        dtype: of the result, fp32 or bf16.
        channels_last: lay the result out as N, H, W, C.

    Returns:
        (N, 3, H, W). It does not require grad.

    Raises:
        RtkError: if shapes, dtypes or devices do not fit one another.
    """
    return _bwd_op(
        grad,
        index,
        weight,
        std,
        input_size=list(input_size),
        stride=stride,
        padding=padding,
        pool=pool,
        dtype=dtype,
        channels_last=channels_last,
    )


def _check_filter(op: str, weight: Tensor, std: Tensor, stride: int, padding: int) -> None:
    require(
        weight.dim() == 4 and weight.shape[1] == 3,
        "%s: weight must be (K, 3, R, S), got %s",
        op,
        tuple(weight.shape),
    )
    require(
        tuple(std.shape) == (3,),
        "%s: std must be (3,), got %s; one a channel",
        op,
        tuple(std.shape),
    )
    for name, tensor in (("weight", weight), ("std", std)):
        _check_fp32(op, name, tensor)
    require(stride >= 1, "%s: stride must be >= 1, got %s", op, stride)
    require(padding >= 0, "%s: padding must be >= 0, got %s", op, padding)


def _check_fp32(op: str, name: str, tensor: Tensor) -> None:
    require(
        tensor.dtype == torch.float32,
        "%s: %s must be float32, got %s; use .float()",
        op,
        name,
        tensor.dtype,
    )


def _check_devices(op: str, first: str, base: Tensor, **others: Tensor) -> None:
    for name, tensor in others.items():
        require(
            tensor.device == base.device,
            "%s: %s is on %s and %s on %s; move one with .to()",
            op,
            name,
            tensor.device,
            first,
            base.device,
        )


def _out_size(
    op: str, size: tuple[int, ...], weight: Tensor, stride: int, padding: int, pool: bool
) -> tuple[int, int, int, int]:
    """Return the shape of `out`; raise where the filter does not fit into the padded image."""
    n, _, *image = size
    for length, taps in zip(image, weight.shape[2:], strict=True):
        require(
            1 <= taps <= length + 2 * padding,
            "%s: the filter %s must fit into the image %s with padding %s",
            op,
            tuple(weight.shape[2:]),
            tuple(image),
            padding,
        )
    h, w = (
        (length + 2 * padding - taps) // stride + 1
        for length, taps in zip(image, weight.shape[2:], strict=True)
    )
    if pool:
        h, w = (h - 1) // 2 + 1, (w - 1) // 2 + 1
    return n, weight.shape[0], h, w


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    stride: int,
    padding: int,
    pool: bool,
    save_positive: bool,
) -> None:
    op = "stem_conv2d"
    require(
        x.dim() == 4 and x.shape[1] == 3, "%s: x must be (N, 3, H, W), got %s", op, tuple(x.shape)
    )
    require(
        x.dtype in (torch.float32, _BF16),
        "%s: x must be float32 or bfloat16, got %s",
        op,
        x.dtype,
    )
    _check_filter(op, weight, std, stride, padding)
    for name, tensor, length in (("bias", bias, weight.shape[0]), ("mean", mean, 3)):
        require(
            tuple(tensor.shape) == (length,),
            "%s: %s must be (%s,), got %s",
            op,
            name,
            length,
            tuple(tensor.shape),
        )
        _check_fp32(op, name, tensor)
    _check_devices(op, "x", x, weight=weight, bias=bias, mean=mean, std=std)
    _out_size(op, x.shape, weight, stride, padding, pool)


def _empty(
    x: Tensor,
    weight: Tensor,
    *_: Tensor,
    stride: int,
    padding: int,
    pool: bool,
    save_positive: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    size = _out_size("stem_conv2d", x.shape, weight, stride, padding, pool)
    out = torch.empty(size, dtype=_BF16, device=x.device, memory_format=_LAST)
    positive = empty_positive(out, save_positive)
    if pool:
        index = torch.empty(size, dtype=torch.uint8, device=x.device, memory_format=_LAST)
        return out, index, positive
    return out, torch.empty(0, dtype=torch.uint8, device=x.device), positive


_op = Op(
    "stem_conv2d(Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor std, *, int stride, "
    "int padding, bool pool, bool save_positive) -> (Tensor, Tensor, Tensor)",
    _check,
    _empty,
)
_op.no_gradient()


def _why_not_geometry(weight: Tensor, stride: int, padding: int, pool: bool) -> str | None:
    k, _, *taps = weight.shape
    geometry = (*taps, stride, padding, pool)
    if geometry not in ((7, 7, 2, 3, True), (3, 3, 1, 1, False)):
        return (
            "it takes 7x7 filters with stride 2, padding 3 and pool, and 3x3 with stride 1, "
            f"padding 1 and no pool, not {taps[0]}x{taps[1]} with stride {stride}, "
            f"padding {padding} and pool={pool}"
        )
    if k % 8 or not 8 <= k <= 64:
        return f"K is {k}, it takes multiples of 8 up to 64"
    return None


def _why_not_gpu(*tensors: Tensor) -> str | None:
    """Return why the kernels cannot run where the tensors are."""
    reason = _compiled.why_not_cuda(*tensors)
    if reason is None and torch.cuda.get_device_capability(tensors[0].device) < (9, 0):
        return "the GPU is older than sm_90: the kernels need its shared memory"
    return reason


def _why_not_forward(
    x: Tensor,
    weight: Tensor,
    *rest: Tensor,
    stride: int,
    padding: int,
    pool: bool,
    save_positive: bool,
) -> str | None:
    return _why_not_gpu(x, weight, *rest) or _why_not_geometry(weight, stride, padding, pool)


@_op.implementation("cuda", _why_not_forward)
def _cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    stride: int,
    padding: int,
    pool: bool,
    save_positive: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    options: Any = {"stride": stride, "padding": padding, "pool": pool}
    out, index, positive = _empty(x, weight, **options, save_positive=save_positive and not pool)
    weight, bias, mean, std = (t.contiguous() for t in (weight, bias, mean, std))
    _compiled._C.stem_conv2d_cuda(
        x.data_ptr(),
        _compiled.DTYPES[x.dtype],
        x.stride(),
        weight.data_ptr(),
        bias.data_ptr(),
        mean.data_ptr(),
        std.data_ptr(),
        out.data_ptr(),
        index.data_ptr(),
        positive.data_ptr(),
        (x.shape[0], x.shape[2], x.shape[3], weight.shape[0]),
        pool,
        x.device.index,
        torch.cuda.current_stream(x.device).cuda_stream,
    )
    if save_positive and pool:  # the pooled image is small
        positive = pack_positive(out)
    return out, index, positive


@_op.implementation("reference")
def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    stride: int,
    padding: int,
    pool: bool,
    save_positive: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    options: Any = {"stride": stride, "padding": padding, "pool": pool}
    out, index, positive = _empty(x, weight, **options, save_positive=save_positive)
    if out.numel() > 0:
        _fill_reference(out, index, x, weight, bias, mean, std, **options)
        if save_positive:
            positive = pack_positive(out)
    return out, index, positive


def _fill_reference(
    out: Tensor,
    index: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    stride: int,
    padding: int,
    pool: bool,
) -> None:
    normalised = ((x.float() - mean.view(3, 1, 1)) / std.view(3, 1, 1)).to(_BF16).float()
    value = F.conv2d(normalised, weight.to(_BF16).float(), bias, stride, padding).relu().to(_BF16)
    if not pool:
        out.copy_(value)
        return
    # In fp32 and contiguous: the bf16 values, which keep their ties.
    pooled, flat = F.max_pool2d(
        value.float().contiguous(), _POOL, stride=2, padding=1, return_indices=True
    )
    width = value.shape[-1]
    row, column = flat // width, flat % width
    top = 2 * torch.arange(out.shape[2], device=x.device).view(-1, 1) - 1
    left = 2 * torch.arange(out.shape[3], device=x.device) - 1
    out.copy_(pooled)
    index.copy_((row - top) * _POOL + column - left)


def _check_bwd(
    grad: Tensor,
    index: Tensor,
    weight: Tensor,
    std: Tensor,
    *,
    input_size: list[int],
    stride: int,
    padding: int,
    pool: bool,
    dtype: torch.dtype,
    channels_last: bool,
) -> None:
    op = "stem_conv2d_bwd_input"
    require(
        len(input_size) == 4 and input_size[1] == 3,
        "%s: input_size must be (N, 3, H, W), got %s",
        op,
        tuple(input_size),
    )
    require(grad.dtype == _BF16, "%s: grad must be bfloat16, got %s", op, grad.dtype)
    require(index.dtype == torch.uint8, "%s: index must be uint8, got %s", op, index.dtype)
    require(
        dtype in (torch.float32, _BF16),
        "%s: dtype must be float32 or bfloat16, got %s",
        op,
        dtype,
    )
    _check_filter(op, weight, std, stride, padding)
    size = _out_size(op, tuple(input_size), weight, stride, padding, pool)
    for name, tensor, wanted in (("grad", grad, size), ("index", index, size if pool else (0,))):
        require(
            tuple(tensor.shape) == tuple(wanted),
            "%s: %s must have the shape %s that the forward returned, got %s",
            op,
            name,
            tuple(wanted),
            tuple(tensor.shape),
        )
    _check_devices(op, "grad", grad, index=index, weight=weight, std=std)


def _empty_bwd(
    grad: Tensor,
    *_: Tensor,
    input_size: list[int],
    dtype: torch.dtype,
    channels_last: bool,
    **__: object,
) -> Tensor:
    format = _LAST if channels_last else torch.contiguous_format
    return torch.empty(input_size, dtype=dtype, device=grad.device, memory_format=format)


_bwd_op = Op(
    "stem_conv2d_bwd_input(Tensor grad, Tensor index, Tensor weight, Tensor std, *, "
    "SymInt[] input_size, int stride, int padding, bool pool, ScalarType dtype, "
    "bool channels_last) -> Tensor",
    _check_bwd,
    _empty_bwd,
)
_bwd_op.no_gradient()


def _why_not_backward(
    grad: Tensor,
    index: Tensor,
    weight: Tensor,
    std: Tensor,
    *,
    stride: int,
    padding: int,
    pool: bool,
    **_: object,
) -> str | None:
    return _why_not_gpu(grad, index, weight, std) or _why_not_geometry(
        weight, stride, padding, pool
    )


@_bwd_op.implementation("cuda", _why_not_backward)
def _cuda_bwd(
    grad: Tensor,
    index: Tensor,
    weight: Tensor,
    std: Tensor,
    *,
    input_size: list[int],
    stride: int,
    padding: int,
    pool: bool,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    dx = _empty_bwd(grad, input_size=input_size, dtype=dtype, channels_last=channels_last)
    # No copy where they are what the forward returns and what follows it gives back.
    grad = grad.contiguous(memory_format=_LAST)
    index = index.contiguous(memory_format=_LAST) if pool else index
    weight, std = weight.contiguous(), std.contiguous()
    _compiled._C.stem_conv2d_bwd_input_cuda(
        grad.data_ptr(),
        index.data_ptr(),
        weight.data_ptr(),
        std.data_ptr(),
        dx.data_ptr(),
        _compiled.DTYPES[dtype],
        (input_size[0], input_size[2], input_size[3], weight.shape[0]),
        pool,
        channels_last,
        grad.device.index,
        torch.cuda.current_stream(grad.device).cuda_stream,
    )
    return dx


@_bwd_op.implementation("reference")
def _reference_bwd(
    grad: Tensor,
    index: Tensor,
    weight: Tensor,
    std: Tensor,
    *,
    input_size: list[int],
    stride: int,
    padding: int,
    pool: bool,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    dx = _empty_bwd(grad, input_size=input_size, dtype=dtype, channels_last=channels_last)
    if dx.numel() == 0 or grad.numel() == 0:
        return dx.zero_()
    if pool:
        size = _out_size("stem_conv2d_bwd_input", tuple(input_size), weight, stride, padding, False)
        unpooled = _unpool(grad.float(), index, size[2], size[3]).to(_BF16).float()
    else:
        unpooled = grad.float()
    gradient = conv2d_input(tuple(input_size), weight.to(_BF16).float(), unpooled, stride, padding)
    return dx.copy_(gradient / std.view(3, 1, 1))


def _unpool(grad: Tensor, index: Tensor, h: int, w: int) -> Tensor:
    """Return the (N, K, h, w) gradient before the max-pool: position by position, no atomics."""
    n, k, pooled_h, pooled_w = grad.shape
    # One row and column of border around what the windows cover.
    whole = grad.new_zeros(n, k, 2 * pooled_h + 1, 2 * pooled_w + 1)
    for position in range(_POOL * _POOL):
        row, column = divmod(position, _POOL)
        place = whole[:, :, row : row + 2 * pooled_h : 2, column : column + 2 * pooled_w : 2]
        place += torch.where(index == position, grad, grad.new_zeros(()))
    return whole[:, :, 1 : h + 1, 1 : w + 1]
