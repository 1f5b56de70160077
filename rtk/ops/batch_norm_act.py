"""batch_norm_act: batch norm, residual addition and ReLU in as few passes as there can be.

Three ops: `batch_norm_stats` reads the batch and updates the running statistics (the only one that
changes an argument), `batch_norm_act` applies them, and `batch_norm_act_bwd` is its gradient, in
training through the statistics, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from rtk.ops import _registry
from rtk.ops._batch_norm import (
    GROUP,
    LAST,
    check_batch,
    check_like,
    check_vectors,
    empty_like,
    empty_positive,
    exact_dtype,
    pack,
    rows_of,
    shaped,
    tiling,
    why_not_gpu,
)
from rtk.ops._batch_norm_autograd import gradients, is_plain, plainly, remember
from rtk.ops._registry import Op, require
from rtk.ops.batch_norm_act_bwd import batch_norm_act_bwd_op
from rtk.ops.batch_norm_stats import batch_norm_stats_op


def batch_norm_act(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool,
    relu: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """Normalise the channels of `x`, add `residual`, apply ReLU (Ioffe and Szegedy 2015).

    relu((x - mean) / sqrt(var + eps) * weight + bias + residual), with the mean and the (biased)
    variance of each channel over N, H and W where `training`, else with the running ones. On a GPU
    channels_last tensors take three passes over memory in training and two otherwise, computed in
    fp32 and rounded once; the gradient takes five. What decides whether a ReLU passes a gradient is
    kept as bits; there it differentiates once. Elsewhere, inside torch.func, and with a forced
    backend other than "triton", this is F.batch_norm, an addition and F.relu, bit for bit.

    Args:
        x: (N, C, H, W), floating; the GPU kernels take bf16, fp16 and fp32, channels_last, and C a
            multiple of 8.
        residual: like x, or None.
        weight: (C,), floating (the GPU kernels take fp32, as all below), or None for 1.
        bias: (C,), or None for 0.
        running_mean: (C,), updated in place where `training`: (1 - momentum) old + momentum batch.
        running_var: (C,), likewise, with the unbiased variance.
        training: whether the statistics are the batch's.
        relu: whether the ReLU follows.
        momentum: share of the batch in the new running statistics, in [0, 1].
        eps: added to the variance.
        num_batches_tracked: () int64, counts up by one where `training`; None counts nothing.

    Returns:
        (N, C, H, W) in the dtype and layout of `x`, differentiable in x, residual, weight and bias.

    Raises:
        RtkError: if shapes, dtypes or devices do not fit; if there is one value a channel only to
            take a variance of; if running statistics are missing where they are needed.
    """
    vectors = weight, bias, running_mean, running_var
    if not _fits(x, residual, vectors, training):
        _check_call(x, residual, *vectors, training)
    forced = _registry._forced
    if forced == "triton" or (
        forced is None
        and x.is_cuda
        and not _transformed()
        and why_not_gpu(x, residual, *vectors) is None
    ):
        rest = training, relu, momentum, eps
        count = num_batches_tracked
        countable = count is None or (count.is_cuda and count.dim() == 0)
        if forced is None and countable and is_plain(x, residual, *vectors, count):
            return plainly("triton", x, residual, *vectors, count, *rest)
        return _by_ops(x, residual, *vectors, *rest, count)
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    # F.batch_norm, without its look at the shape, which was one of ours.
    cudnn = torch.backends.cudnn.enabled
    out = torch.batch_norm(
        x, weight, bias, running_mean, running_var, training, momentum, eps, cudnn
    )
    if residual is not None:
        out += residual
    return torch.relu_(out) if relu else out


def _transformed() -> bool:
    """Return whether torch.func or forward mode is at work, which PyTorch's operators know."""
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


def _by_ops(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    relu: bool,
    momentum: float,
    eps: float,
    num_batches_tracked: Tensor | None,
) -> Tensor:
    mean, var = running_mean, running_var
    if training:
        mean, var = batch_norm_stats_op(x, running_mean, running_var, num_batches_tracked, momentum)
    return _op(x, residual, mean, var, weight, bias, training, eps, relu, False)[0]


def _fits(
    x: Tensor, residual: Tensor | None, vectors: tuple[Tensor | None, ...], training: bool
) -> bool:
    """Return whether `_check_call` finds nothing: in a tenth of the time."""
    if x.dim() != 4 or not x.is_floating_point():
        return False
    shape, device = x.shape, x.device
    size = shape[1:2]
    for vector in vectors:
        if vector is not None and (vector.shape != size or vector.device != device):
            return False
    if residual is not None and (residual.shape != shape or residual.device != device):
        return False
    _, _, mean, var = vectors
    if (mean is None) != (var is None):
        return False
    return x.numel() != shape[1] if training else mean is not None


def _check_call(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
) -> None:
    op = "batch_norm_act"
    check_vectors(
        op, x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var
    )
    check_like(op, "residual", residual, x)
    require(
        (running_mean is None) == (running_var is None),
        "%s: running_mean and running_var come together; give both or neither",
        op,
    )
    if training:
        check_batch(op, x)
    else:
        require(
            running_mean is not None,
            "%s: without training it needs running_mean and running_var",
            op,
        )


def _check(
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *_: object,
) -> None:
    op = "batch_norm_act"
    check_vectors(op, x, mean=mean, var=var, weight=weight, bias=bias)
    check_like(op, "residual", residual, x)


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_like(x), empty_positive(x, rest[-1])


_op = Op(
    "batch_norm_act(Tensor x, Tensor? residual, Tensor mean, Tensor var, Tensor? weight, "
    "Tensor? bias, bool training, float eps, bool relu, bool save_positive) -> (Tensor, Tensor)",
    _check,
    _fake,
)


def _why_not_apply(
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *_: object,
) -> str | None:
    return why_not_gpu(x, residual, mean, var, weight, bias)


@_op.implementation("triton", _why_not_apply)
def _triton(
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
    save_positive: bool,
) -> tuple[Tensor, Tensor]:
    from rtk.kernels.batch_norm_act import batch_norm_apply

    out, positive = _fake(x, save_positive)
    if residual is not None:
        residual = residual.contiguous(memory_format=LAST)
    blocks, options = tiling(x, 4 if residual is None else 2)
    tiles = -(-rows_of(x) // (options["U"] * options["R"]))
    with torch.cuda.device_of(x):
        batch_norm_apply[(tiles * blocks,)](
            x,
            residual,
            mean,
            var,
            weight,
            bias,
            out,
            positive if save_positive else None,
            rows_of(x),
            x.shape[1] // GROUP,
            eps,
            RELU=relu,
            **options,
        )
    return out, positive


@_op.implementation("reference")
def _reference(
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
    save_positive: bool,
) -> tuple[Tensor, Tensor]:
    out, positive = _fake(x, save_positive)
    exact = exact_dtype(x)
    scale = (shaped(var, exact) + eps).rsqrt()
    if weight is not None:
        scale = scale * shaped(weight, exact)
    value = (x.to(exact) - shaped(mean, exact)) * scale
    if bias is not None:
        value = value + shaped(bias, exact)
    if residual is not None:
        value = value + residual
    out.copy_(value.relu() if relu else value)
    if save_positive:
        positive.copy_(pack(out > 0))
    return out, positive


class _Autograd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        training: bool,
        eps: float,
        relu: bool,
        save_positive: bool,
    ) -> tuple[Tensor, Tensor]:
        out, positive = _op.below_autograd(
            x, residual, mean, var, weight, bias, training, eps, relu, relu
        )
        ctx.mark_non_differentiable(positive)
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 4, 5)]
        saved = positive if relu else None
        remember(ctx, x, residual, mean, var, weight, bias, saved, training, eps, needs)
        return out, positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: object) -> tuple[Tensor | None, ...]:
        of_x, of_residual, *of_vectors = gradients(ctx, grad, batch_norm_act_bwd_op)
        return of_x, of_residual, None, None, *of_vectors, *[None] * 4


_op.autograd(_Autograd)
