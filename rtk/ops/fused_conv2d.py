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
from rtk.ops._conv_output import empty_output, empty_positive, natural_size, output_shape
from rtk.ops._fused_conv2d_cuda import DENSITY, run_cuda, why_not_cuda
from rtk.ops._registry import Op, require
from rtk.ops._triton import why_not_triton
from rtk.ops.live_tiles import check_words
from rtk.ops.positive_bits import pack_positive, unpack_positive
from rtk.ops.prepare_weight import FLOATS

_LAST = torch.channels_last


def fused_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    live: Tensor | None = None,
    *,
    relu: bool = False,
    stride: int = 1,
    padding: int = 0,
    upsample: int = 1,
    out_size: Sequence[int] | None = None,
    residual_stride: int = 1,
    save_positive: bool = False,
    density: float = DENSITY,
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
        live: (ceil(K / 64), R * S) int64, `live_tiles(weight)`, or None. Weights whose bit is off
            are 0, and the CUDA backend skips them; the others multiply them.
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
        density: the share of bits of `live` that are on, 0 to 1, as far as it is known without
            asking the GPU. It decides only how the work is cut up.

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
        live,
        relu=relu,
        stride=stride,
        padding=padding,
        upsample=upsample,
        out_size=out_size,
        residual_stride=residual_stride,
        save_positive=save_positive,
        density=density,
    )
    return (out, positive) if save_positive else out


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
    live: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    residual_stride: int = 1,
    density: float = DENSITY,
) -> Tensor:
    """Return the input gradient of `conv2d(x, w, stride=stride, padding=padding)`, with epilogue.

    Args:
        grad: (N, K, OH, OW), the gradient of the convolution's output.
        turned: (C, K, R, R), `turn_filter(w)`.
        input_size: (H, W) of x.
        bias, residual, gate, residual_stride: as for `fused_conv2d`, in the shape of x.
        live, density: as for `fused_conv2d`; live is `live_tiles(turned)`.
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
        live,
        upsample=stride,
        padding=turned.shape[2] - 1 - padding,
        out_size=input_size,
        residual_stride=residual_stride,
        density=density,
    )


def _check(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    live: Tensor | None = None,
    *,
    relu: bool,
    stride: int,
    padding: int,
    upsample: int,
    out_size: Sequence[int] | None,
    residual_stride: int,
    save_positive: bool,
    density: float = DENSITY,
) -> None:
    require(relu or not save_positive, "fused_conv2d: save_positive needs relu=True")
    _check_convolution(input, weight, stride, padding, upsample, out_size)
    require(
        residual_stride in (1, 2),
        "fused_conv2d: residual_stride must be 1 or 2, got %s",
        residual_stride,
    )
    if live is not None:
        check_words("fused_conv2d", live, weight)
        require(0 <= density <= 1, "fused_conv2d: density must be 0 to 1, got %s", density)
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
    natural = natural_size(input, weight, stride, padding, upsample)
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


def _fake(*tensors: Tensor | None, save_positive: bool, **options: Any) -> tuple[Tensor, Tensor]:
    out = empty_output(*tensors, **options)  # type: ignore[arg-type]
    return out, empty_positive(out, save_positive)


_op = Op(
    "fused_conv2d(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, Tensor? gate, "
    "Tensor? live=None, *, bool relu, SymInt stride, SymInt padding, SymInt upsample, "
    "SymInt[]? out_size, SymInt residual_stride, bool save_positive, "
    f"float density={DENSITY}) -> (Tensor, Tensor)",
    _check,
    _fake,
)
_op.no_gradient()
_op.implementation("cuda", why_not_cuda)(run_cuda)


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
    live: Tensor | None = None,
    *,
    save_positive: bool,
    density: float = DENSITY,
    config: Any = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Run `rtk.kernels.fused_conv2d`; `config` is one of its candidates, given to time it."""
    from rtk.kernels.fused_conv2d import launch

    out = empty_output(input, weight, **options)
    positive = empty_positive(out, save_positive)
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
    live: Tensor | None = None,
    *,
    relu: bool,
    stride: int,
    padding: int,
    upsample: int,
    out_size: Sequence[int] | None,
    residual_stride: int,
    save_positive: bool,
    density: float = DENSITY,
) -> tuple[Tensor, Tensor]:
    out = empty_output(
        input, weight, stride=stride, padding=padding, upsample=upsample, out_size=out_size
    )
    if out.numel() == 0:
        return out, empty_positive(out, save_positive)
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
    return out, pack_positive(out) if save_positive else empty_positive(out, False)
