"""A masked convolution in eager training, past torch's dispatcher.

An operator that is written in Python costs some 100 us on its way through the dispatcher (autocast,
autograd, backend), and a masked convolution is four of them: more than a small network's
convolutions take on a GPU. In the common case, plain tensors with a bool mask, one autograd
function calls what the operators would, and where both gradients are cuDNN's (or oneDNN's) one
call gives both. What compiles, traces, transforms or profiles, or forces a backend, sees the
operators, and so does every call with a mistake in it, which they name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rtk.ops import _conv_paths, _registry
from rtk.ops._layout import memory_format
from rtk.ops.prepare_weight import FLOATS, prepare_now, wants_channels_last

_LOW = (torch.bfloat16, torch.float16)
Conv = tuple[Sequence[int], Sequence[int], Sequence[int], int]


def convolve(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    prepared: Tensor | None,
    turned: Tensor | None,
    bias: Tensor | None,
    conv: Conv,
    paths: Sequence[str] = _conv_paths.CUDNN,
    lists: Sequence[Tensor | None] = _conv_paths.NO_LISTS,
    densities: Sequence[float] = _conv_paths.DENSITIES,
) -> Tensor | None:
    """Return the convolution, or None where it is the operators' to do, or to refuse.

    Arguments are `masked_conv2d_prepared`'s, `conv` its (stride, padding, dilation, groups);
    `prepared` None is made here.
    """
    tensors = input, weight, mask, prepared, bias
    if _registry.is_forced() or not _registry.unwatched(*tensors):
        return None
    if not (weight.requires_grad and torch.is_grad_enabled() and input.numel()):
        return None
    if input.dim() != 4 or input.shape[1] != weight.shape[1] * conv[3] or mask.requires_grad:
        return None
    if mask.shape != weight.shape or mask.dtype != torch.bool or input.dtype not in FLOATS:
        return None
    device = input.device
    if any(t is not None and t.device != device for t in tensors):
        return None
    if torch.is_autocast_enabled(device.type) and input.dtype != torch.float64:
        input = input.to(torch.get_autocast_dtype(device.type))
    dtypes = {t.dtype for t in (weight, bias) if t is not None} - {input.dtype}
    if dtypes and (dtypes != {torch.float32} or input.dtype not in _LOW):  # fp32 masters
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    if prepared is not None and (prepared.dtype, prepared.shape) != (input.dtype, weight.shape):
        return None
    if tuple(paths) != _conv_paths.CUDNN and _why_not(paths, weight, conv) is not None:
        return None
    result: Tensor = _Convolve.apply(
        input, weight, mask, prepared, turned, bias, conv, paths, lists, densities
    )
    return result


def _why_not(paths: Sequence[str], weight: Tensor, conv: Conv) -> str | None:
    *ways, of_weight = paths
    reasons = [_conv_paths.why_not_path(path, weight, *conv) for path in ways]
    reasons.append(_conv_paths.why_not_bwd_weight_path(of_weight, weight, *conv))
    return next(filter(None, reasons), None)


def _aten(conv: Conv) -> tuple[Any, ...]:
    stride, padding, dilation, groups = conv
    return list(stride), list(padding), list(dilation), False, [0, 0], groups


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        mask: Tensor,
        prepared: Tensor | None,
        turned: Tensor | None,
        bias: Tensor | None,
        conv: Conv,
        paths: Sequence[str],
        lists: Sequence[Tensor | None],
        densities: Sequence[float],
    ) -> Tensor:
        if prepared is None:
            prepared = prepare_now(weight, mask, input.dtype, wants_channels_last(input, weight))
        ctx.save_for_backward(input, weight, mask, prepared, turned, *lists[1:])
        ctx.conv, ctx.paths, ctx.densities = conv, paths[1:], densities[1:]
        ctx.bias = None if bias is None else bias.dtype
        if _conv_paths.takes(paths[0], input):
            how = conv[0][0], conv[1][0], densities[0]
            return _conv_paths.forward(paths[0], lists[0], input, prepared, bias, *how)
        bias = None if bias is None else bias.to(input.dtype)
        return torch.ops.aten.convolution(input, prepared, bias, *_aten(conv))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mask, prepared, turned, *lists = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_input = grad_weight = grad_bias = None
        stride, padding, dilation, _ = ctx.conv
        if needs[0] and _conv_paths.takes(ctx.paths[0], grad):
            grad_input = _conv_paths.bwd_input(
                ctx.paths[0],
                lists[0],
                grad,
                prepared,
                turned,
                input.shape[2:],
                stride[0],
                padding[0],
                ctx.densities[0],
            )
        if needs[1] and _conv_paths.takes_bwd_weight(
            ctx.paths[1], grad, input, weight, mask, False
        ):
            given = grad, input, weight, mask, stride, padding, dilation, ctx.densities[1]
            grad_weight = _conv_paths.bwd_weight(ctx.paths[1], lists[1], *given)
        left = [needs[0] and grad_input is None, needs[1] and grad_weight is None, False]
        if any(left):
            of_input, dense, _ = torch.ops.aten.convolution_backward(
                grad, input, prepared, None, *_aten(ctx.conv), left
            )
            if left[0]:
                grad_input = of_input
            if left[1]:  # in the weight's own format: autograd would copy it there
                channels_last = memory_format(weight) == torch.channels_last
                grad_weight = prepare_now(dense, mask, weight.dtype, channels_last)
        if needs[5]:
            grad_bias = grad.sum((0, 2, 3), dtype=ctx.bias)
        return grad_input, grad_weight, None, None, None, grad_bias, None, None, None, None
