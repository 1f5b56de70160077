"""A masked convolution in eager training, past torch's dispatcher.

An operator that is written in Python costs some 100 us at every stop of the dispatcher (autocast,
autograd, backend), which is more than a small network's convolutions take on a GPU. In the common
case, cuDNN (or oneDNN) on plain tensors with a bool mask, there is nothing to decide: one autograd
function calls the convolution, and one call gives both gradients. What compiles, traces,
transforms, profiles or forces a backend sees the operator, and so does every call with a mistake
in it, which the operator names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from rtk.ops import _registry
from rtk.ops._layout import memory_format
from rtk.ops.prepare_weight import FLOATS, prepare_now, wants_channels_last

_PLAIN = {Tensor, nn.Parameter}
_LOW = (torch.bfloat16, torch.float16)


def convolve(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    prepared: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor | None:
    """Return the convolution, or None where it is the operator's to do, or to refuse.

    Arguments are `masked_conv2d_prepared`'s; `prepared` None is made here.
    """
    if not (weight.requires_grad and torch.is_grad_enabled() and _is_plain(input, weight, mask)):
        return None
    if input.dim() != 4 or input.shape[1] != weight.shape[1] * groups or not input.numel():
        return None
    if mask.shape != weight.shape or mask.dtype != torch.bool or input.dtype not in FLOATS:
        return None
    device = input.device
    if not (device == weight.device == mask.device and input.is_floating_point()):
        return None
    if torch.is_autocast_enabled(device.type) and input.dtype != torch.float64:
        input = input.to(torch.get_autocast_dtype(device.type))
    for tensor in (weight, bias):
        if tensor is None or tensor.dtype == input.dtype:
            continue
        if tensor.dtype != torch.float32 or input.dtype not in _LOW:
            return None
    if bias is not None and not (
        type(bias) in _PLAIN and bias.device == device and bias.shape == weight.shape[:1]
    ):
        return None
    if prepared is not None and not (
        prepared.dtype == input.dtype
        and prepared.shape == weight.shape
        and prepared.device == device
    ):
        return None
    if _watched():
        return None
    conv = list(stride), list(padding), list(dilation), False, [0, 0], groups
    result: Tensor = _Convolve.apply(input, weight, mask, prepared, bias, conv)
    return result


def _is_plain(*tensors: Tensor) -> bool:
    return all(type(t) in _PLAIN and (t.is_cuda or t.is_cpu) and not t.is_neg() for t in tensors)


def _watched() -> bool:
    """Whether somebody wants to see the operator, or a backend is forced."""
    return bool(
        torch.compiler.is_compiling()
        or _registry._forced is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    )


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        mask: Tensor,
        prepared: Tensor | None,
        bias: Tensor | None,
        conv: tuple[Any, ...],
    ) -> Tensor:
        if prepared is None:
            prepared = prepare_now(weight, mask, input.dtype, wants_channels_last(input, weight))
        ctx.save_for_backward(input, weight, mask, prepared)
        ctx.conv = conv
        ctx.bias = None if bias is None else bias.dtype
        bias = None if bias is None else bias.to(input.dtype)
        return torch.ops.aten.convolution(input, prepared, bias, *conv)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mask, prepared = ctx.saved_tensors
        need_input, need_weight, _, _, need_bias, _ = ctx.needs_input_grad
        grad_input, dense, _ = torch.ops.aten.convolution_backward(
            grad, input, prepared, None, *ctx.conv, [need_input, need_weight, False]
        )
        grad_weight = grad_bias = None
        if need_weight:  # in the weight's own format: autograd would copy it there
            channels_last = memory_format(weight) == torch.channels_last
            grad_weight = prepare_now(dense, mask, weight.dtype, channels_last)
        if need_bias:
            grad_bias = grad.sum((0, 2, 3), dtype=ctx.bias)
        return grad_input, grad_weight, None, None, grad_bias, None
