"""fused_conv2d: a convolution with bias, residual, ReLU and the ReLU's backward in its epilogue.

N C H W input, K output channels, R S filter, OH OW output. For hand-written forward and
input-gradient passes over frozen weights (an attack's inner loop), so it has no gradient itself.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rtk.ops import _compiled
from rtk.ops._conv_tiles import Problem, Tile, pick
from rtk.ops._registry import Op, require
from rtk.ops._triton import why_not_triton
from rtk.ops.prepare_weight import FLOATS

_LAST = torch.channels_last


def fused_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    relu: bool = False,
    stride: int = 1,
    padding: int = 0,
    upsample: int = 1,
    out_size: Sequence[int] | None = None,
    residual_stride: int = 1,
    save_positive: bool = False,
) -> Any:
    """Convolve, then add bias and residual, apply ReLU, and gate, in one pass over the output.

    With z the convolution of the input (zeros put between its pixels where `upsample` is 2):

        v = z + bias + residual;  v = max(v, 0) if relu;  out = v where gate > 0, else 0

    All sums are in fp32 (fp64 for fp64 tensors) and rounded once.

    The input gradient of `conv2d(x, w, stride=s, padding=p)` is such a convolution too, with the
    filter turned round; `fused_conv2d_bwd_input` and `turn_filter` spell it out:

        fused_conv2d(grad, turn_filter(w), upsample=s, padding=R - 1 - p, out_size=x.shape[2:])

    With gate=x, where x is a saved post-ReLU activation, it goes on through the ReLU's backward;
    with residual=, it adds the gradient that comes along a skip connection.

    Args:
        input: (N, C, H, W), floating; bf16 is what the GPU kernels take. Here and below, a memory
            format other than channels_last costs a copy.
        weight: (K, C, R, S), the input's dtype.
        bias: (K,), fp32 or the input's dtype, or None.
        residual: (N, K, ceil(OH / residual_stride), ceil(OW / residual_stride)), the input's
            dtype, or None.
        gate: (N, K, OH, OW), the input's dtype (a NaN counts as not positive), or the bits that
            `save_positive` gave, or None.
        relu: whether negative values become 0. NaN stays NaN, as in torch.relu.
        stride: of the convolution, at least 1.
        padding: zeros around the (upsampled) input, at least 0.
        upsample: 1, or 2: the convolution then sees 2H - 1 x 2W - 1 pixels, every second one 0,
            as `conv_transpose2d` with stride 2 does. Needs stride 1.
        out_size: (OH, OW): the output is cropped to it, or under upsample=2 one larger where that
            is asked for (the zeros go on below and to the right). None is the natural size.
        residual_stride: 1, or 2: the residual belongs to the output pixels whose row and column
            are both even (what a 1x1 convolution with stride 2 hands back).
        save_positive: also return out > 0 as bits, a sixteenth of a bf16 activation to read where
            it gates the way back. Needs relu.

    Returns:
        (N, K, OH, OW), the input's dtype, channels_last; it does not require grad. With
        save_positive a pair of it and the bits, (N, OH, OW, 4 ceil(K / 64)) int16; see
        `pack_positive`.

    Raises:
        RtkError: if shapes, dtypes or devices do not fit.
    """
    out, positive = _op(
        input,
        weight,
        bias,
        residual,
        gate,
        relu=relu,
        stride=stride,
        padding=padding,
        upsample=upsample,
        out_size=out_size,
        residual_stride=residual_stride,
        save_positive=save_positive,
    )
    return (out, positive) if save_positive else out


def pack_positive(out: Tensor) -> Tensor:
    """Return out > 0 as bits, (N, H, W, 4 ceil(K / 64)) int16, for out (N, K, H, W).

    Channel 64 a + 8 b + 2 q + e is bit 8 e + b of word 4 a + q: the order in which the matrix
    instruction of Hopper GPUs leaves its sums, so that no lane has to ask another one.
    """
    n, k, h, w = out.shape
    if (
        _compiled.why_not_cuda(out) is None
        and out.dtype == torch.bfloat16
        and k % 64 == 0
        and out.is_contiguous(memory_format=_LAST)
    ):
        bits = torch.empty((n, h, w, k // 16), dtype=torch.int16, device=out.device)
        stream = torch.cuda.current_stream(out.device).cuda_stream
        _compiled._C.positive_bits_cuda(
            out.data_ptr(), bits.data_ptr(), out.numel(), out.device.index, stream
        )
        return bits
    bits = F.pad(out.permute(0, 2, 3, 1) > 0, (0, -k % 64)).unflatten(3, (-1, 8, 4, 2))
    b, e = torch.arange(8, device=out.device), torch.arange(2, device=out.device)
    words = (bits * (1 << (8 * e + b[:, None, None]))).sum((4, 6))
    return words.to(torch.int16).flatten(3)  # the upper half of 0 to 65535 becomes negative


def unpack_positive(bits: Tensor, channels: int) -> Tensor:
    """Return what `pack_positive` packed, (N, K, H, W) bool, channels_last."""
    b, e = torch.arange(8, device=bits.device), torch.arange(2, device=bits.device)
    words = bits.unflatten(3, (-1, 1, 4, 1)) >> (8 * e + b[:, None, None])
    return (words & 1).bool().flatten(3)[..., :channels].permute(0, 3, 1, 2)


def turn_filter(weight: Tensor) -> Tensor:
    """Return the weight (C, K, R, S) of the input gradient of a convolution with `weight`.

    Args:
        weight: (K, C, R, S), any dtype.

    Returns:
        (C, K, R, S), channels_last: input and output channels swapped, the filter turned by half
        a circle.
    """
    return weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=_LAST)


def fused_conv2d_bwd_input(
    grad: Tensor,
    turned: Tensor,
    input_size: Sequence[int],
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    residual_stride: int = 1,
) -> Tensor:
    """Return the input gradient of `conv2d(x, w, stride=stride, padding=padding)`, with epilogue.

    Args:
        grad: (N, K, OH, OW), the gradient of the convolution's output.
        turned: (C, K, R, R), `turn_filter(w)`.
        input_size: (H, W) of x.
        bias, residual, gate, residual_stride: as for `fused_conv2d`, in the shape of x.
        stride, padding: the forward convolution's: 1 or 2, and 0 to R - 1.

    Returns:
        (N, C, H, W): gate > 0 of the gradient + residual; channels_last.

    Raises:
        RtkError: if something does not fit; for a filter that is not square.
    """
    require(
        turned.dim() == 4 and turned.shape[2] == turned.shape[3],
        "fused_conv2d_bwd_input: turned must be (C, K, R, R), got %s",
        tuple(turned.shape),
    )
    require(
        0 <= padding < turned.shape[2],
        "fused_conv2d_bwd_input: padding must be 0 to R - 1 = %s, got %s",
        turned.shape[2] - 1,
        padding,
    )
    return fused_conv2d(
        grad,
        turned,
        bias,
        residual,
        gate,
        upsample=stride,
        padding=turned.shape[2] - 1 - padding,
        out_size=input_size,
        residual_stride=residual_stride,
    )


def _natural_size(
    input: Tensor, weight: Tensor, stride: int, padding: int, upsample: int
) -> list[int]:
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
    size = _natural_size(input, weight, stride, padding, upsample) if out_size is None else out_size
    return [input.shape[0], weight.shape[0], *size]


def _check(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    *,
    relu: bool,
    stride: int,
    padding: int,
    upsample: int,
    out_size: Sequence[int] | None,
    residual_stride: int,
    save_positive: bool,
) -> None:
    require(relu or not save_positive, "fused_conv2d: save_positive needs relu=True")
    _check_convolution(input, weight, stride, padding, upsample, out_size)
    require(
        residual_stride in (1, 2),
        "fused_conv2d: residual_stride must be 1 or 2, got %s",
        residual_stride,
    )
    n, k, *size = output_shape(input, weight, stride, padding, upsample, out_size)
    small = [-(-s // residual_stride) for s in size]
    wanted = {
        "weight": (weight, None, "(K, C, R, S)"),
        "bias": (bias, [k], "(K,)"),
        "residual": (residual, [n, k, *small], "(N, K, OH, OW) over residual_stride"),
        "gate": (gate, [n, k, *size], "(N, K, OH, OW)"),
    }
    if gate is not None and gate.dtype == torch.int16:
        words = 4 * -(-k // 64)
        wanted["gate"] = (gate, [n, *size, words], "(N, OH, OW, 4 ceil(K / 64)) bits")
    for name, (tensor, shape, legend) in wanted.items():
        if tensor is None:
            continue
        require(
            shape is None or list(tensor.shape) == shape,
            "fused_conv2d: %s must be %s = %s, got %s",
            name,
            legend,
            shape and tuple(shape),
            tuple(tensor.shape),
        )
        require(
            tensor.device == input.device,
            "fused_conv2d: input is on %s and %s on %s; move one with .to()",
            input.device,
            name,
            tensor.device,
        )
        require(
            tensor.dtype == input.dtype
            or (name == "bias" and tensor.dtype == torch.float32)
            or (name == "gate" and tensor.dtype == torch.int16),
            "fused_conv2d: %s must be %s like the input, got %s; cast it with .to()",
            name,
            input.dtype,
            tensor.dtype,
        )


def _check_convolution(
    input: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    upsample: int,
    out_size: Sequence[int] | None,
) -> None:
    require(input.dtype in FLOATS, "fused_conv2d: input must be floating, got %s", input.dtype)
    for name, tensor, legend in (
        ("input", input, "(N, C, H, W)"),
        ("weight", weight, "(K, C, R, S)"),
    ):
        require(
            tensor.dim() == 4 and min(tensor.shape[1:]) > 0,
            "fused_conv2d: %s must be %s, none of the last three 0, got %s",
            name,
            legend,
            tuple(tensor.shape),
        )
    require(weight.shape[0] > 0, "fused_conv2d: weight has no output channels")
    require(
        input.shape[1] == weight.shape[1],
        "fused_conv2d: input has %s channels, weight %s takes %s",
        input.shape[1],
        tuple(weight.shape),
        weight.shape[1],
    )
    require(stride >= 1, "fused_conv2d: stride must be at least 1, got %s", stride)
    require(padding >= 0, "fused_conv2d: padding must be at least 0, got %s", padding)
    require(upsample in (1, 2), "fused_conv2d: upsample must be 1 or 2, got %s", upsample)
    require(
        upsample == 1 or stride == 1,
        "fused_conv2d: upsample=2 needs stride=1, got stride=%s",
        stride,
    )
    natural = _natural_size(input, weight, stride, padding, upsample)
    size = natural if out_size is None else list(out_size)
    require(
        len(size) == 2 and min(size) >= 1,
        "fused_conv2d: the output must be at least 1 x 1, got %s; is the filter larger than the "
        "padded input?",
        tuple(size),
    )
    require(
        all(s <= n + upsample - 1 for s, n in zip(size, natural, strict=True)),
        "fused_conv2d: out_size is at most %s here, got %s",
        tuple(n + upsample - 1 for n in natural),
        tuple(size),
    )


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
    """Allocate the output of these arguments."""
    shape = output_shape(input, weight, stride, padding, upsample, out_size)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=_LAST)


def _empty_positive(out: Tensor, save_positive: bool) -> Tensor:
    n, k, h, w = out.shape
    shape = (n, h, w, 4 * -(-k // 64)) if save_positive else (0,)
    return torch.empty(shape, dtype=torch.int16, device=out.device)


def _fake(*tensors: Tensor | None, save_positive: bool, **options: Any) -> tuple[Tensor, Tensor]:
    out = empty_output(*tensors, **options)  # type: ignore[arg-type]
    return out, _empty_positive(out, save_positive)


_op = Op(
    "fused_conv2d(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, Tensor? gate, *, "
    "bool relu, SymInt stride, SymInt padding, SymInt upsample, SymInt[]? out_size, "
    "SymInt residual_stride, bool save_positive) -> (Tensor, Tensor)",
    _check,
    _fake,
)
_op.no_gradient()


def _why_not_cuda(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    *,
    relu: bool,
    stride: int,
    upsample: int,
    residual_stride: int,
    **_: object,
) -> str | None:
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


def _problem(
    input: Tensor,
    weight: Tensor,
    out: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    **options: Any,
) -> Problem:
    return Problem(
        n=input.shape[0],
        c=input.shape[1],
        k=weight.shape[0],
        r=weight.shape[2],
        out_h=out.shape[2],
        out_w=out.shape[3],
        stride=options["stride"],
        upsample=options["upsample"],
        residual_stride=0 if residual is None else options["residual_stride"],
        gated=gate is not None,
    )


@_op.implementation("cuda", _why_not_cuda)
def _cuda(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    *,
    save_positive: bool,
    tile: Tile | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Run csrc/cuda/fused_conv2d.cu, with the tile that is known to be fastest or with `tile`."""
    out = empty_output(input, weight, **options)
    positive = _empty_positive(out, save_positive)
    if out.numel() == 0:
        return out, positive
    input, weight = (t.contiguous(memory_format=_LAST) for t in (input, weight))
    residual = None if residual is None else residual.contiguous(memory_format=_LAST)
    bias, gate = (None if t is None else t.contiguous() for t in (bias, gate))
    bias = None if bias is None else bias.float()

    def address(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    n, c, h, w = input.shape
    k, _, r, s = weight.shape
    arguments = (
        *map(address, (input, weight, bias, residual, gate, out)),
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
        tile = pick(device, _problem(input, weight, out, residual, gate, **options), run, fits)
    run(tile)
    return out, positive


def _why_not_triton(
    input: Tensor, weight: Tensor, *__: Tensor | None, **options: Any
) -> str | None:
    shape = [options[name] for name in ("stride", "padding", "upsample", "out_size")]
    n, _, oh, ow = output_shape(input, weight, *shape)
    if max(n * oh * ow, weight.numel()) >= 2**31 - 2**10:
        return "it counts output pixels and weights in 32 bits"
    if os.environ.get("TRITON_INTERPRET") == "1":
        # On the CPU, for the tests; its bf16 product is wrong.
        return _compiled.why_not_dtype(input, "input", torch.float32)
    reason = why_not_triton(input) or _compiled.why_not_dtype(input, "input", torch.bfloat16)
    if reason is None and torch.cuda.get_device_capability(input.device) < (8, 0):
        return "its bf16 product needs a GPU of compute capability 8.0 or more"
    return reason


@_op.implementation("triton", _why_not_triton)
def _triton(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    *,
    save_positive: bool,
    config: Any = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Run `rtk.kernels.fused_conv2d`; `config` is one of its candidates, given to time it."""
    from rtk.kernels.fused_conv2d import launch

    out = empty_output(input, weight, **options)
    positive = _empty_positive(out, save_positive)
    if out.numel() == 0:
        return out, positive
    del options["out_size"]  # it is out's
    if gate is not None:
        is_bits = gate.dtype == torch.int16
        gate = gate.contiguous() if is_bits else gate.contiguous(memory_format=_LAST)
    launch(
        input.contiguous(memory_format=_LAST),
        weight.contiguous(memory_format=_LAST),
        None if bias is None else bias.contiguous(),
        None if residual is None else residual.contiguous(memory_format=_LAST),
        gate,
        out,
        positive if save_positive else None,
        config=config,
        **options,
    )
    return out, positive


def _dilate(input: Tensor, upsample: int) -> Tensor:
    if upsample == 1:
        return input
    n, c, h, w = input.shape
    dilated = input.new_zeros(n, c, upsample * (h - 1) + 1, upsample * (w - 1) + 1)
    dilated[:, :, ::upsample, ::upsample] = input
    return dilated


def _epilogue(
    z: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    relu: bool,
    residual_stride: int,
) -> Tensor:
    """Finish a convolution that is already summed; writes into `z`."""
    if bias is not None:
        z += bias.to(z.dtype)[:, None, None]
    if residual is not None:
        z[:, :, ::residual_stride, ::residual_stride] += residual
    if relu:
        z.relu_()
    if gate is None:
        return z
    is_open = unpack_positive(gate, z.shape[1]) if gate.dtype == torch.int16 else gate > 0
    return z.masked_fill_(~is_open, 0)


@_op.implementation("reference")
def _reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    *,
    relu: bool,
    stride: int,
    padding: int,
    upsample: int,
    out_size: Sequence[int] | None,
    residual_stride: int,
    save_positive: bool,
) -> tuple[Tensor, Tensor]:
    out = empty_output(
        input, weight, stride=stride, padding=padding, upsample=upsample, out_size=out_size
    )
    if out.numel() == 0:
        return out, _empty_positive(out, save_positive)
    exact = torch.promote_types(input.dtype, torch.float32)
    dilated = _dilate(input.to(exact), upsample)
    # The last row and column that the last output pixel sees: what F.pad adds or cuts off.
    below, right = (
        (size - 1) * stride + taps - padding - given
        for size, taps, given in zip(
            out.shape[2:], weight.shape[2:], dilated.shape[2:], strict=True
        )
    )
    z = F.conv2d(F.pad(dilated, (padding, right, padding, below)), weight.to(exact), stride=stride)
    out.copy_(_epilogue(z, bias, residual, gate, relu, residual_stride))
    return out, pack_positive(out) if save_positive else _empty_positive(out, False)


def _cudnn(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    relu: bool = False,
    stride: int = 1,
    padding: int = 0,
    upsample: int = 1,
    out_size: Sequence[int] | None = None,
    residual_stride: int = 1,
    forward_weight: Tensor | None = None,
) -> Tensor:
    """Do the same with torch's own operators, rounding in between: the peer to be measured against.

    cuDNN's fused operators run where they can (ReLU, no gate, residual of the output's size);
    else aten's convolution, or for upsample=2 the transposed one, and elementwise operators. The
    transposed one takes the weight of the forward convolution, which costs time to make here.
    """
    fused = relu and gate is None and residual_stride == 1 and upsample == 1 and out_size is None
    if fused:
        bias = None if bias is None else bias.to(input.dtype)
        conv = (bias, [stride] * 2, [padding] * 2, [1, 1], 1)
        if residual is None:
            return torch.cudnn_convolution_relu(input, weight, *conv)
        return torch.cudnn_convolution_add_relu(input, weight, residual, 1.0, *conv)
    size = output_shape(input, weight, stride, padding, upsample, out_size)[2:]
    if upsample == 1:
        z = F.conv2d(input, weight, stride=stride, padding=padding)
    else:
        natural = _natural_size(input, weight, stride, padding, upsample)
        z = F.conv_transpose2d(
            input,
            turn_filter(weight) if forward_weight is None else forward_weight,
            stride=upsample,
            padding=[taps - 1 - padding for taps in weight.shape[2:]],
            output_padding=[max(0, w - n) for w, n in zip(size, natural, strict=True)],
        )
    z = z[:, :, : size[0], : size[1]]
    return _epilogue(z, bias, residual, gate, relu, residual_stride)
