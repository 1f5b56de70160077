"""The derivative of batch_norm_act, and its plain call: one autograd function, no dispatcher.

What the dispatcher is for (fakes, compilation, torch.func, modes that look at every operator) is
not asked for by a plain eager call, and three operators with their checks are more Python than the
kernels of a small layer take on a GPU. So a plain call has checked its tensors once and runs the
implementations of the three ops themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction, once_differentiable

from rtk.ops import _registry
from rtk.ops._batch_norm import sums_needed
from rtk.ops._layout import memory_format
from rtk.ops.batch_norm_act_bwd import batch_norm_act_bwd_op

_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def is_plain(*tensors: Tensor | None) -> bool:
    """Return whether autograd alone follows a call: no compiler, mode, transform or subclass."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
        and all(t is None or type(t) is Tensor or type(t) is nn.Parameter for t in tensors)
    )


def plainly(
    backend: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    count: Tensor | None,
    training: bool,
    relu: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Return batch_norm_act by a backend that serves the tensors, which are checked already."""
    tensors = x, residual, weight, bias, running_mean, running_var, count
    options = backend, training, relu, momentum, eps
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors[:4]):
        function: Any = _Plain
        return function.apply(*tensors, options)
    return _forward(False, *tensors, *options)[0]


@functools.cache
def _implementations(backend: str) -> list[Callable[..., Any]]:
    """Return how a backend runs batch_norm_stats, batch_norm_act and batch_norm_act_bwd."""
    return [
        next(i.run for i in _registry.ops[name].implementations if i.backend == backend)
        for name in ("batch_norm_stats", "batch_norm_act", "batch_norm_act_bwd")
    ]


def _forward(
    save: bool,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    count: Tensor | None,
    backend: str,
    training: bool,
    relu: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the output, where it is positive (if `save` and `relu`), and the statistics."""
    stats, apply, _ = _implementations(backend)
    if training:
        mean, var = stats(x, mean, var, count, momentum)
    save = save and relu
    out, positive = apply(x, residual, mean, var, weight, bias, training, eps, relu, save)
    return out, positive, mean, var


class _Plain(_SingleLevelFunction):
    """Without what Function.apply does for torch.func, which `is_plain` excludes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        count: Tensor | None,
        options: tuple[str, bool, bool, float, float],
    ) -> Tensor:
        out, positive, mean, var = _forward(
            True, x, residual, weight, bias, running_mean, running_var, count, *options
        )
        ctx.backend, training, relu, _, eps = options
        saved = positive if relu else None
        needs = list(ctx.needs_input_grad[:4])
        remember(ctx, x, residual, mean, var, weight, bias, saved, training, eps, needs)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Autograd leaves gradients enabled for a second derivative only, which is refused.
        return (_refusing if torch.is_grad_enabled() else _backward)(ctx, grad)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # A backend that is forced meanwhile is a matter of the operator.
    forced = _registry._forced is not None
    run = batch_norm_act_bwd_op if forced else _implementations(ctx.backend)[2]
    return (*gradients(ctx, grad, run), None, None, None, None)


_refusing = once_differentiable(_backward)


def remember(
    ctx: Any,
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    positive: Tensor | None,
    training: bool,
    eps: float,
    needs: list[bool],
) -> None:
    """Keep in a Function's context what `gradients` takes.

    Args:
        ctx: of the forward.
        x, residual, mean, var, weight, bias: the operator's.
        positive: the bits of the ReLU, if there is one.
        training, eps: the operator's.
        needs: whether x, residual, weight and bias need a gradient.
    """
    ctx.save_for_backward(x if sums_needed(training, needs) else None, positive, mean, var, weight)
    dtypes = [None if t is None else t.dtype for t in (x, residual, weight, bias)]
    ctx.call = training, eps, memory_format(x), needs, dtypes


def gradients(ctx: Any, grad: Tensor, run: Callable[..., Any]) -> _Gradients:
    """Return the gradients of x, residual, weight and bias, by `run`: batch_norm_act_bwd."""
    x, positive, mean, var, weight = ctx.saved_tensors
    training, eps, layout, needs, dtypes = ctx.call
    grad = grad.contiguous(memory_format=layout)
    # Without a ReLU the residual's gradient is the output's.
    passed_on = needs[1] and positive is None
    ours = [needs[0], needs[1] and not passed_on, needs[2], needs[3]]
    found = list(run(grad, x, positive, mean, var, weight, training, eps, ours))
    if passed_on:
        found[1] = grad
    for i in range(4):
        if not needs[i]:
            found[i] = None
        elif found[i].dtype != dtypes[i]:
            found[i] = found[i].to(dtypes[i])
    return tuple(found)
