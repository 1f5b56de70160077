"""prepare_weight: mask, cast and lay out a weight in one pass, ready for cuDNN, oneDNN or BLAS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rtk.ops import _compiled
from rtk.ops._layout import broadcasts_to, memory_format, sum_to
from rtk.ops._registry import Op, require

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def prepare_weight(
    weight: Tensor, mask: Tensor, *, dtype: torch.dtype | None = None, channels_last: bool = False
) -> Tensor:
    """Return weight * mask in `dtype` and in the asked memory format.

    Args:
        weight: the dense master, (K, C, R, S) or (N, K), floating.
        mask: bool, or floating (it scales, and may require grad); broadcasts to `weight`.
        dtype: of the result; the weight's by default.
        channels_last: lay the result out as K, R, S, C (4-D weights only).

    Returns:
        A new dense tensor of the weight's shape. Under a bool mask a pruned weight is exactly
        +0, whatever the master holds there. Differentiable in `weight` and a floating `mask`.

    Raises:
        RtkError: if the mask does not broadcast, or is neither bool nor floating.
    """
    return _op(weight, mask, dtype or weight.dtype, channels_last)


def check_mask(op: str, legend: str, weight: Tensor, mask: Tensor) -> None:
    """Raise an RtkError unless `mask` is bool or floating, beside the weight, and broadcasts."""
    require(
        mask.dtype == torch.bool or mask.is_floating_point(),
        "%s: mask must be bool or floating, got %s; use mask.bool()",
        op,
        mask.dtype,
    )
    require(
        mask.device == weight.device,
        "%s: mask is on %s and weight on %s; move one with .to()",
        op,
        mask.device,
        weight.device,
    )
    if not broadcasts_to(mask.shape, weight.shape):
        missing = weight.dim() - mask.dim()
        remedy = (
            f"use mask[..., {', '.join(['None'] * missing)}]"
            if missing > 0 and tuple(mask.shape) == tuple(weight.shape[: mask.dim()])
            else "give each dimension the weight's size or 1"
        )
        require(
            False,
            "%s: mask must broadcast to %s = %s, got %s; %s",
            op,
            legend,
            tuple(weight.shape),
            tuple(mask.shape),
            remedy,
        )


def apply_mask(tensor: Tensor, mask: Tensor) -> Tensor:
    """Return tensor * mask, with an exact +0 wherever a bool mask is False."""
    if mask.dtype == torch.bool:
        return torch.where(mask, tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device))
    return tensor * mask


def mask_gradient(grad: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """Return the mask's gradient, sum over the broadcast dimensions of grad * weight."""
    exact = torch.promote_types(weight.dtype, mask.dtype)
    return sum_to(grad.to(exact) * weight, mask.shape).to(mask.dtype)


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _check(weight: Tensor, mask: Tensor, dtype: torch.dtype, channels_last: bool) -> None:
    require(weight.dtype in FLOATS, "prepare_weight: weight must be floating, got %s", weight.dtype)
    require(dtype in FLOATS, "prepare_weight: dtype must be floating, got %s", dtype)
    require(
        not channels_last or weight.dim() == 4,
        "prepare_weight: channels_last needs a 4-D weight, got %d-D",
        weight.dim(),
    )
    check_mask("prepare_weight", "weight", weight, mask)


def _fake(weight: Tensor, mask: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    return torch.empty(
        weight.shape, dtype=dtype, device=weight.device, memory_format=_format(channels_last)
    )


_op = Op(
    "prepare_weight(Tensor weight, Tensor mask, ScalarType dtype, bool channels_last) -> Tensor",
    _check,
    _fake,
)


def _compiled_arguments(
    weight: Tensor, mask: Tensor, dtype: torch.dtype, channels_last: bool
) -> tuple[Tensor, tuple[Any, ...]]:
    """Allocate the result and describe all three tensors to C++, padded to four dimensions."""
    out = _fake(weight, mask, dtype, channels_last)
    # Broadcast dimensions get stride 0, nothing is copied.
    expanded = mask if mask.shape == weight.shape else mask.expand(weight.shape)
    pad = 4 - weight.dim()

    def strides(tensor: Tensor) -> list[int]:
        return [0] * pad + list(tensor.stride())

    dtypes = _compiled.DTYPES
    return out, (
        weight.data_ptr(),
        dtypes[weight.dtype],
        strides(weight),
        mask.data_ptr(),
        dtypes[mask.dtype],
        strides(expanded),
        out.data_ptr(),
        dtypes[dtype],
        strides(out),
        [1] * pad + list(weight.shape),
    )


def _why_not_shape(weight: Tensor, mask: Tensor) -> str | None:
    if weight.dim() > 4:
        return f"weight is {weight.dim()}-D, it takes up to 4-D"
    return _compiled.why_not_dtype(mask, "mask", torch.bool, *FLOATS)


@_op.implementation("cpu", lambda w, m, *_: _compiled.why_not_cpu(w, m) or _why_not_shape(w, m))
def _cpu(weight: Tensor, mask: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    out, arguments = _compiled_arguments(weight, mask, dtype, channels_last)
    _compiled._C.prepare_weight_cpu(*arguments, torch.get_num_threads())
    return out


@_op.implementation("cuda", lambda w, m, *_: _compiled.why_not_cuda(w, m) or _why_not_shape(w, m))
def _cuda(weight: Tensor, mask: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    out, arguments = _compiled_arguments(weight, mask, dtype, channels_last)
    stream = torch.cuda.current_stream(weight.device).cuda_stream
    _compiled._C.prepare_weight_cuda(*arguments, weight.device.index, stream)
    return out


@_op.implementation("reference")
def _reference(weight: Tensor, mask: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    # The product in at least fp32, as the compiled versions do.
    exact = torch.promote_types(weight.dtype, torch.float32)
    if mask.dtype != torch.bool:
        mask = mask.to(exact)
    masked = apply_mask(weight.to(exact), mask)
    return _fake(weight, mask, dtype, channels_last).copy_(masked)


class _Autograd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, mask: Tensor, dtype: torch.dtype, channels_last: bool
    ) -> Tensor:
        ctx.save_for_backward(weight, mask)
        return _op.below_autograd(weight, mask, dtype, channels_last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, mask = ctx.saved_tensors
        need_weight, need_mask = ctx.needs_input_grad[:2]
        grad = grad.to(weight.dtype)
        return (
            apply_mask(grad, mask).to(weight.dtype) if need_weight else None,
            mask_gradient(grad, weight, mask) if need_mask else None,
            None,
            None,
        )


_op.autograd(_Autograd)


def prepare_now(weight: Tensor, mask: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Run `prepare_weight` inside another op: arguments are checked, the dispatcher is behind."""
    arguments = (weight, mask, dtype, channels_last)
    return _op.choose(*arguments).run(*arguments)


def prepare_all_now(
    weights: Sequence[Tensor], masks: Sequence[Tensor], dtype: torch.dtype, channels_last: bool
) -> list[Tensor]:
    """Run `prepare_now` on every layer; on a GPU one launch serves all that are alike."""
    layers = [(w, m, dtype, channels_last) for w, m in zip(weights, masks, strict=True)]
    chosen = [_op.choose(*layer) for layer in layers]
    devices = {weight.device for weight in weights}
    if len(devices) != 1 or any(each.run is not _cuda for each in chosen):
        return [each.run(*layer) for each, layer in zip(chosen, layers, strict=True)]
    described = [_compiled_arguments(*layer) for layer in layers]
    [device] = devices
    stream = torch.cuda.current_stream(device).cuda_stream
    _compiled._C.prepare_weights_cuda([row for _, row in described], device.index, stream)
    return [out for out, _ in described]


def prepare_below_autograd(
    weight: Tensor, mask: Tensor, dtype: torch.dtype, channels_last: bool
) -> Tensor:
    """Run it inside another op's autograd function."""
    return _op.below_autograd(weight, mask, dtype, channels_last)


prepare_fake = _fake  # `prepare_now`'s twin for fake tensors


def wants_channels_last(input: Tensor, weight: Tensor) -> bool:
    """Whether a convolution of the two runs in channels_last: where either of them is."""
    return torch.channels_last in (memory_format(input), memory_format(weight))
