"""masked_conv2d: conv2d(input, weight * mask), with gradients for everything.

N C H W input, K output channels, R S filter, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rtk.errors import check_choice
from rtk.ops import _compiled, _conv_paths, _masked_conv2d_eager
from rtk.ops._conv_paths import (
    CUDNN,
    DENSITIES,
    NO_LISTS,
    why_not_bwd_weight_path,
    why_not_path,
)
from rtk.ops._layout import memory_format
from rtk.ops._registry import Op, require
from rtk.ops.prepare_weight import (
    FLOATS,
    apply_mask,
    check_mask,
    mask_gradient,
    prepare_below_autograd,
    prepare_fake,
    prepare_now,
    wants_channels_last,
)

IntPair = int | Sequence[int]
Prepare = Callable[[Tensor, Tensor, torch.dtype, bool], Tensor]


def masked_conv2d(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: IntPair | str = 0,
    dilation: IntPair = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve with a masked weight: `F.conv2d(input, weight * mask, bias, ...)`.

    Args:
        input: (N, C, H, W) or (C, H, W), floating.
        weight: (K, C / groups, R, S); the input's dtype, or an fp32 master beside a bf16 or fp16
            input (it is masked and cast in one pass).
        mask: bool, or floating (it may require grad); broadcasts to the weight: (K, C, R, S) by
            element, (K, C, R, 1) row, (K, C, 1, 1) kernel, (K, 1, 1, 1) channel.
        bias: (K,), or None.
        stride, dilation, groups: as for `F.conv2d`.
        padding: as for `F.conv2d`: an int, a pair, "valid" or "same".

    Returns:
        (N, K, H', W') in the input's dtype. Gradients (once): input; weight (the dense weight
        gradient times mask: exactly 0 where pruned); mask (the dense weight gradient times
        weight, summed to the mask's shape, so straight-through estimation is this gradient);
        bias. Only what is needed is computed.

    Raises:
        RtkError: if shapes, dtypes or devices do not fit; the message says which and the remedy.
    """
    stride, dilation = _pair("stride", stride), _pair("dilation", dilation)
    if isinstance(padding, str):
        input, padding = _named_padding(input, weight, padding, stride, dilation)
    padding = _pair("padding", padding)
    if input.dim() == 3:
        return _op(input[None], weight, mask, bias, stride, padding, dilation, groups)[0]
    conv = stride, padding, dilation, groups
    result = _masked_conv2d_eager.convolve(input, weight, mask, None, None, bias, conv)
    return _op(input, weight, mask, bias, *conv) if result is None else result


def _pair(name: str, value: IntPair) -> list[int]:
    if isinstance(value, Sequence):
        require(len(value) == 2, "masked_conv2d: %s must be an int or a pair, got %s", name, value)
        return list(value)
    return [value, value]


def _named_padding(
    input: Tensor, weight: Tensor, padding: str, stride: list[int], dilation: list[int]
) -> tuple[Tensor, list[int]]:
    """Turn "valid" or "same" into numbers; an uneven "same" pads the extra one below and right."""
    check_choice("padding", padding, ("valid", "same"))
    if padding == "valid":
        return input, [0, 0]
    require(stride == [1, 1], "masked_conv2d: padding 'same' needs stride 1, got %s", stride)
    total = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=True)]
    if any(t % 2 for t in total):
        input = F.pad(input, (0, total[1] % 2, 0, total[0] % 2))
    return input, [t // 2 for t in total]


def _check_conv(
    input_shape: Sequence[int],
    weight: Tensor,
    mask: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> None:
    require(
        len(input_shape) == 4,
        "masked_conv2d: input must be (N, C, H, W) or (C, H, W), got %s",
        tuple(input_shape),
    )
    require(
        weight.dim() == 4, "masked_conv2d: weight must be (K, C, R, S), got %s", tuple(weight.shape)
    )
    require(groups >= 1, "masked_conv2d: groups must be at least 1, got %s", groups)
    require(min(stride) >= 1, "masked_conv2d: stride must be at least 1, got %s", stride)
    require(min(padding) >= 0, "masked_conv2d: padding must be at least 0, got %s", padding)
    require(min(dilation) >= 1, "masked_conv2d: dilation must be at least 1, got %s", dilation)
    require(
        input_shape[1] == weight.shape[1] * groups,
        "masked_conv2d: input has %s channels, weight %s with groups=%s takes %s",
        input_shape[1],
        tuple(weight.shape),
        groups,
        weight.shape[1] * groups,
    )
    require(
        weight.shape[0] % groups == 0,
        "masked_conv2d: %s output channels do not divide into groups=%s",
        weight.shape[0],
        groups,
    )
    check_mask("masked_conv2d", "(K, C, R, S)", weight, mask)


def _check(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> None:
    _check_conv(input.shape, weight, mask, stride, padding, dilation, groups)
    require(weight.dtype in FLOATS, "masked_conv2d: weight must be floating, got %s", weight.dtype)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        require(
            tensor.device == input.device,
            "masked_conv2d: input is on %s and %s on %s; move one with .to()",
            input.device,
            name,
            tensor.device,
        )
        require(
            tensor.dtype == input.dtype
            or (tensor.dtype == torch.float32 and input.dtype in (torch.bfloat16, torch.float16)),
            "masked_conv2d: input is %s and %s %s; they must be equal, or an fp32 master beside "
            "a bf16 or fp16 input",
            input.dtype,
            name,
            tensor.dtype,
        )
    require(
        bias is None or bias.shape == weight.shape[:1],
        "masked_conv2d: bias must be (K,) = (%s,), got %s",
        weight.shape[0],
        None if bias is None else tuple(bias.shape),
    )


def _convolve(input: Tensor, weight: Tensor, bias: Tensor | None, *conv: Any) -> Tensor:
    stride, padding, dilation, groups = conv
    bias = None if bias is None else bias.to(input.dtype)
    return torch.ops.aten.convolution(
        input, weight, bias, stride, padding, dilation, False, [0, 0], groups
    )


def _convolve_backward(
    grad: Tensor, input: Tensor, weight: Tensor, *conv: Any, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    stride, padding, dilation, groups = conv
    return torch.ops.aten.convolution_backward(
        grad, input, weight, None, stride, padding, dilation, False, [0, 0], groups, needs
    )


def _shape_only(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    """Return a tensor for an argument that only gives its sizes; on a GPU it has no memory."""
    if like.device.type != "cpu":
        return like.new_empty(1).expand(shape)
    # oneDNN would fill in an expanded one; pages that nobody touches cost nothing.
    format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, memory_format=format)


def _forward(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    *conv: Any,
    prepare: Prepare = prepare_now,
) -> Tensor:
    prepared = prepare(weight, mask, input.dtype, wants_channels_last(input, weight))
    return _convolve(input, prepared, bias, *conv)


# The fakes run the same code on fake tensors, so their strides are those of the real thing.
_op = Op(
    "masked_conv2d(Tensor input, Tensor weight, Tensor mask, Tensor? bias, SymInt[2] stride, "
    "SymInt[2] padding, SymInt[2] dilation, SymInt groups) -> Tensor",
    _check,
    partial(_forward, prepare=prepare_fake),
)
_op.autocast_first_argument()


def masked_conv2d_prepared(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    prepared: Tensor,
    turned: Tensor | None,
    bias: Tensor | None,
    stride: IntPair,
    padding: IntPair,
    dilation: IntPair,
    groups: int,
    paths: Sequence[str] = CUDNN,
    lists: Sequence[Tensor | None] = NO_LISTS,
    densities: Sequence[float] = DENSITIES,
) -> Tensor:
    """`masked_conv2d` for whoever has prepared the weight already, as a model does for all layers.

    Args:
        input: (N, C, H, W).
        weight, mask: what gets the gradients; the weight is never read, the mask not in the
            forward.
        prepared: `prepare_weight(weight, mask, dtype=...)` in the dtype that the input is in, or
            under autocast will be in. It must hold these values until after the backward.
        turned: `turn_filter(prepared)`, which the input's gradient reads where its path is not
            "cudnn"; None makes it where it is needed.
        bias, stride, padding, dilation, groups: as for `masked_conv2d`.
        paths: of the forward, of the input's and of the weight's gradient: "cudnn"; "skip", which
            passes over blocks of 64 x 64 weights that are all zero; "blocks32", "blocks64" or
            "blocks128", which do so as a product of matrices, for 1x1 filters; or, not of the
            weight's gradient, "sparse", which multiplies only by weights that are not zero.
            `rtk.nn.tune` measures which is faster, `why_not_path` and `why_not_bwd_weight_path` say
            what cannot. A path serves bf16 in channels_last on a GPU, and of the weight's gradient
            a bool mask and an fp32 weight in channels_last; anything else is cuDNN's.
        lists: what the paths read: `live_tiles` or `sparse_columns` of `prepared`, of `turned`, and
            for the weight's gradient `live_tiles` of the mask in the weight's shape, which may
            stand in the forward's place too; `live_blocks` of `prepared` or of the mask for both
            ways of a product, of the mask for the weight's gradient; None makes them where they are
            needed.
        densities: of each way the share of its path's blocks that are alive, 0 to 1, as far as it
            is known without asking the GPU; how the work is cut up, nothing else.

    Returns:
        What `masked_conv2d` returns, with its gradients.

    Raises:
        RtkError: as `masked_conv2d`; for a `prepared` of another shape, dtype or device; for a path
            that cannot be taken.
    """
    require(
        len(paths) == len(lists) == len(densities) == 3,
        "masked_conv2d_prepared: paths, lists and densities are of the forward, of the input's and "
        "of the weight's gradient, got %s, %s and %s of them",
        len(paths),
        len(lists),
        len(densities),
    )
    conv = _pair("stride", stride), _pair("padding", padding), _pair("dilation", dilation), groups
    result = _masked_conv2d_eager.convolve(
        input, weight, mask, prepared, turned, bias, conv, paths, lists, densities
    )
    if result is not None:
        return result
    given = input, weight, mask, prepared, turned, bias, *conv
    return _op_prepared(*given, *paths, *lists, [*densities])


def _check_prepared(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    prepared: Tensor,
    turned: Tensor | None,
    bias: Tensor | None,
    *conv_and_paths: Any,
) -> None:
    *conv, path, input_path, weight_path, _, _, _, densities = conv_and_paths
    _check(input, weight, mask, bias, *conv)
    k, c, *taps = weight.shape
    for name, tensor, shape in (("prepared", prepared, (k, c)), ("turned", turned, (c, k))):
        require(
            tensor is None
            or (
                tuple(tensor.shape) == (*shape, *taps)
                and tensor.dtype == input.dtype
                and tensor.device == input.device
            ),
            "masked_conv2d_prepared: %s must be %s in %s on %s, got %s",
            name,
            (*shape, *taps),
            input.dtype,
            input.device,
            tensor if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.device),
        )
    for each in (path, input_path):
        reason = why_not_path(each, weight, *conv)
        require(reason is None, "masked_conv2d_prepared: path %r cannot be: %s", each, reason)
    _check_bwd_weight_path("masked_conv2d_prepared", weight_path, weight, conv)
    for density in densities:
        _check_density("masked_conv2d_prepared", density)


def _check_bwd_weight_path(op: str, path: str, weight: Tensor, conv: Sequence[Any]) -> None:
    reason = why_not_bwd_weight_path(path, weight, *conv)
    require(reason is None, "%s: path %r of the weight gradient cannot be: %s", op, path, reason)


def _check_density(op: str, density: float) -> None:
    require(0 <= density <= 1, "%s: density must be 0 to 1, got %s", op, density)


def _forward_prepared(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    prepared: Tensor,
    turned: Tensor | None,
    bias: Tensor | None,
    *conv_and_paths: Any,
) -> Tensor:
    return _convolve(input, prepared, bias, *conv_and_paths[:4])


def _forward_on_path(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    prepared: Tensor,
    turned: Tensor | None,
    bias: Tensor | None,
    *conv_and_paths: Any,
) -> Tensor:
    *conv, path, _, _, lists, _, _, densities = conv_and_paths
    if not _conv_paths.takes(path, input):
        return _convolve(input, prepared, bias, *conv)
    (stride, _), (padding, _) = conv[:2]
    given = input, prepared, bias, stride, padding, densities[0]
    return _conv_paths.forward(path, lists, *given)


_op_prepared = Op(
    "masked_conv2d_prepared(Tensor input, Tensor weight, Tensor mask, Tensor prepared, "
    "Tensor? turned, Tensor? bias, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
    "SymInt groups, str path, str bwd_input_path, str bwd_weight_path, Tensor? lists, "
    "Tensor? bwd_input_lists, Tensor? bwd_weight_lists, float[] densities) -> Tensor",
    _check_prepared,
    _forward_prepared,
)
_op_prepared.autocast_first_argument()


def _check_bwd_input(
    grad: Tensor,
    prepared: Tensor,
    turned: Tensor | None,
    input_size: Sequence[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    path: str,
    lists: Tensor | None,
    density: float,
) -> None:
    require(
        len(input_size) == 4 and input_size[1] == prepared.shape[1] * groups,
        "masked_conv2d_bwd_input: input_size must be (N, C, H, W) with C = %s, got %s",
        prepared.shape[1] * groups,
        tuple(input_size),
    )
    reason = why_not_path(path, prepared, stride, padding, dilation, groups)
    require(reason is None, "masked_conv2d_bwd_input: path %r cannot be: %s", path, reason)
    _check_density("masked_conv2d_bwd_input", density)


def _bwd_input(
    grad: Tensor,
    prepared: Tensor,
    turned: Tensor | None,
    input_size: Sequence[int],
    *conv_and_path: Any,
) -> Tensor:
    if any(isinstance(size, int) and size == 0 for size in input_size):
        return grad.new_empty(input_size)  # for no images, torch's fake has other strides
    conv = conv_and_path[:-3]
    channels_last = torch.channels_last in (memory_format(grad), memory_format(prepared))
    if channels_last and grad.device.type != "cpu" and conv[-1] == 1:
        return transposed_convolution(grad, prepared, input_size, *conv[:-1])
    input = _shape_only(grad, input_size, channels_last)
    return _convolve_backward(grad, input, prepared, *conv, needs=[True, False, False])[0]


def transposed_convolution(
    grad: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Return the gradient of an input of `input_size`, (N, C, H, W), without groups.

    convolution_backward wants an input; one without memory counts as contiguous, and a `grad` in
    channels_last would be turned round to be like it, and back for cuDNN.
    """
    beyond = [  # what the sizes are more than the least that gives such a result
        size - ((out - 1) * step - 2 * pad + gap * (taps - 1) + 1)
        for size, out, step, pad, gap, taps in zip(
            input_size[2:], grad.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True
        )
    ]
    return torch.ops.aten.convolution(
        grad, weight, None, stride, padding, dilation, True, beyond, 1
    )


def _bwd_input_on_path(
    grad: Tensor,
    prepared: Tensor,
    turned: Tensor | None,
    input_size: Sequence[int],
    *conv_and_path: Any,
) -> Tensor:
    *conv, path, lists, density = conv_and_path
    if not _conv_paths.takes(path, grad):
        return _bwd_input(grad, prepared, turned, input_size, *conv_and_path)
    (stride, _), (padding, _) = conv[:2]
    return _conv_paths.bwd_input(
        path, lists, grad, prepared, turned, input_size[2:], stride, padding, density
    )


_op_bwd_input = Op(
    "masked_conv2d_bwd_input(Tensor grad, Tensor prepared, Tensor? turned, SymInt[] input_size, "
    "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, str path, "
    "Tensor? lists, float density) -> Tensor",
    _check_bwd_input,
    _bwd_input,
)


def _check_bwd_weight(
    grad: Tensor, input: Tensor, weight: Tensor, mask: Tensor, *conv_and_more: Any
) -> None:
    *conv, _, path, _, density = conv_and_more
    _check_conv(input.shape, weight, mask, *conv)
    _check_bwd_weight_path("masked_conv2d_bwd_weight", path, weight, conv)
    _check_density("masked_conv2d_bwd_weight", density)


def _bwd_weight(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    *conv_and_more: Any,
    prepare: Prepare = prepare_now,
) -> list[Tensor]:
    *conv, (need_weight, need_mask), _, _, _ = conv_and_more
    shape = _shape_only(input, weight.shape, wants_channels_last(input, weight))
    dense = _convolve_backward(grad, input, shape, *conv, needs=[False, True, False])[1]
    gradients = []
    if need_weight:  # in the weight's own format: autograd would copy it there
        channels_last = memory_format(weight) == torch.channels_last
        gradients.append(prepare(dense, mask, weight.dtype, channels_last))
    if need_mask:
        if mask.shape == weight.shape:
            channels_last = memory_format(mask) == torch.channels_last
            gradients.append(prepare(weight, dense, mask.dtype, channels_last))
        else:
            gradients.append(mask_gradient(dense, weight, mask))
    return gradients


def _bwd_weight_on_path(
    grad: Tensor, input: Tensor, weight: Tensor, mask: Tensor, *conv_and_more: Any
) -> list[Tensor]:
    *conv, (_, need_mask), path, lists, density = conv_and_more
    stride, padding, dilation, _ = conv
    if not _conv_paths.takes_bwd_weight(path, grad, input, weight, mask, need_mask):
        return _bwd_weight(grad, input, weight, mask, *conv_and_more)
    given = grad, input, weight, mask, stride, padding, dilation
    return [_conv_paths.bwd_weight(path, lists, *given, density)]


_op_bwd_weight = Op(
    "masked_conv2d_bwd_weight(Tensor grad, Tensor input, Tensor weight, Tensor mask, "
    "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, bool[2] needs, "
    "str path, Tensor? lists, float density) -> Tensor[]",
    _check_bwd_weight,
    partial(_bwd_weight, prepare=prepare_fake),
)


def _implement(backend: str, why_not: Callable[..., str | None], *runs: Callable[..., Any]) -> None:
    for op, run in zip(
        (_op, _op_prepared, _op_bwd_input, _op_bwd_weight), (_forward, *runs), strict=True
    ):
        op.implementation(backend, lambda x, w, *_: why_not(x, w))(run)


# Backends differ in how they prepare the weight, which prepare_weight, itself an op, decides; and
# a GPU has other paths than cuDNN.
_implement("cpu", _compiled.why_not_cpu, _forward_prepared, _bwd_input, _bwd_weight)
_ON_PATHS = _forward_on_path, _bwd_input_on_path, _bwd_weight_on_path
_implement("cuda", _compiled.why_not_cuda, *_ON_PATHS)


@_op.implementation("reference")
def _reference(
    input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, *conv: Any
) -> Tensor:
    format = torch.channels_last if wants_channels_last(input, weight) else torch.contiguous_format
    masked = apply_mask(weight, mask).to(input.dtype).contiguous(memory_format=format)
    return _convolve(input, masked, bias, *conv)


_op_prepared.implementation("reference")(_forward_prepared)
_op_bwd_input.implementation("reference")(_bwd_input)
_op_bwd_weight.implementation("reference")(_bwd_weight)


def _run_and_save(
    ctx: Any,
    needs: Sequence[bool],
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    prepared: Tensor,
    turned: Tensor | None,
    bias: Tensor | None,
    *conv_and_paths: Any,
) -> Tensor:
    """Convolve; keep for `_gradients` what those of (input, weight, mask, bias) that need one use.

    The activations are kept for the weight's gradient only: an attack does not pay for them.
    """
    need_input, need_weight, need_mask, _ = needs
    *ctx.conv, _, ctx.input_path, ctx.weight_path, _, lists, live, ctx.densities = conv_and_paths
    ctx.save_for_backward(
        input if need_weight or need_mask else None,
        weight,
        mask,
        prepared if need_input else None,
        turned if need_input else None,
        lists if need_input else None,
        live if need_weight else None,
    )
    ctx.needs = needs
    ctx.input_size = input.shape
    ctx.bias_dtype = None if bias is None else bias.dtype
    return _op_prepared.below_autograd(input, weight, mask, prepared, turned, bias, *conv_and_paths)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, mask, prepared, turned, lists, live = ctx.saved_tensors
    need_input, need_weight, need_mask, need_bias = ctx.needs
    grad_input = grad_bias = None
    if need_input:
        grad_input = _op_bwd_input(
            grad,
            prepared,
            turned,
            ctx.input_size,
            *ctx.conv,
            ctx.input_path,
            lists,
            ctx.densities[1],
        )
    gradients: list[Tensor] = []
    if need_weight or need_mask:
        how = [need_weight, need_mask], ctx.weight_path, live, ctx.densities[2]
        gradients = _op_bwd_weight(grad, input, weight, mask, *ctx.conv, *how)
    if need_bias:
        grad_bias = grad.sum((0, 2, 3), dtype=ctx.bias_dtype)
    grad_weight = gradients.pop(0) if need_weight else None
    grad_mask = gradients.pop(0) if need_mask else None
    return grad_input, grad_weight, grad_mask, grad_bias


class _AutogradPrepared(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, mask: Tensor, prepared: Tensor, *rest: Any
    ) -> Tensor:
        needs = (*ctx.needs_input_grad[:3], ctx.needs_input_grad[5])
        return _run_and_save(ctx, needs, input, weight, mask, prepared, *rest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_input, grad_weight, grad_mask, grad_bias = _gradients(ctx, grad)
        return grad_input, grad_weight, grad_mask, None, None, grad_bias, *[None] * 11


class _Autograd(torch.autograd.Function):
    """Prepares the weight once, for the forward and for the input's gradient."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, *conv: Any
    ) -> Tensor:
        prepared = prepare_below_autograd(
            weight, mask, input.dtype, wants_channels_last(input, weight)
        )
        needs = ctx.needs_input_grad[:4]
        rest = None, bias, *conv, *CUDNN, *NO_LISTS, [*DENSITIES]
        return _run_and_save(ctx, needs, input, weight, mask, prepared, *rest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, grad), None, None, None, None


_op.autograd(_Autograd)
_op_prepared.autograd(_AutogradPrepared)
