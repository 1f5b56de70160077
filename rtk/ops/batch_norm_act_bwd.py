"""batch_norm_act_bwd: all gradients of batch_norm_act that are asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from rtk.ops._batch_norm import (
    GROUP,
    JOIN,
    check_like,
    check_vectors,
    empty_like,
    empty_positive,
    exact_dtype,
    rows_of,
    shaped,
    split_rows,
    sums_needed,
    tiling,
    unpack,
    why_not_gpu,
)
from rtk.ops._registry import Op, require


def _check(
    grad: Tensor,
    x: Tensor | None,
    positive: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    training: bool,
    eps: float,
    needs: list[bool],
) -> None:
    op = "batch_norm_act_bwd"
    check_vectors(op, grad, mean=mean, var=var, weight=weight)
    if x is not None:
        check_like(op, "grad", grad, x)
    require(
        x is not None or not (sums_needed(training, needs)),
        "%s: it needs x for these gradients",
        op,
    )
    if positive is not None:
        wanted = empty_positive(grad.to("meta"), True).shape
        require(
            positive.shape == wanted and positive.dtype == torch.uint8,
            "%s: positive must be what batch_norm_act saved, %s uint8, got %s %s",
            op,
            tuple(wanted),
            tuple(positive.shape),
            positive.dtype,
        )


def _fake(
    grad: Tensor,
    x: Tensor | None,
    positive: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    training: bool,
    eps: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def like_images(needed: bool) -> Tensor:
        return empty_like(grad) if needed else grad.new_empty(0)

    def like_vector(needed: bool) -> Tensor:
        return torch.empty_like(mean) if needed else mean.new_empty(0)

    return (
        like_images(needs[0]),
        like_images(needs[1]),
        like_vector(needs[2]),
        like_vector(needs[3]),
    )


batch_norm_act_bwd_op = Op(
    "batch_norm_act_bwd(Tensor grad, Tensor? x, Tensor? positive, Tensor mean, Tensor var, "
    "Tensor? weight, bool training, float eps, bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _check,
    _fake,
)
batch_norm_act_bwd_op.no_gradient()


def _why_not_triton(
    grad: Tensor,
    x: Tensor | None,
    positive: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    *_: object,
) -> str | None:
    reason = why_not_gpu(grad, None, mean, var, weight)
    return reason if reason is not None or x is None else why_not_gpu(x, grad)


@batch_norm_act_bwd_op.implementation("triton", _why_not_triton)
def _triton(
    grad: Tensor,
    x: Tensor | None,
    positive: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    training: bool,
    eps: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from rtk.kernels.batch_norm_act import batch_norm_bwd_apply

    gradients = _fake(grad, x, positive, mean, var, weight, training, eps, needs)
    of_weight = of_bias = None
    if sums_needed(training, needs):
        assert x is not None
        of_weight = gradients[2] if needs[2] else torch.empty_like(mean)
        of_bias = gradients[3] if needs[3] else torch.empty_like(mean)
        _triton_sums(grad, x, positive, mean, var, eps, of_weight, of_bias)
    if needs[0] or needs[1]:
        blocks, options = tiling(grad, 2)
        tiles = -(-rows_of(grad) // (options["U"] * options["R"]))
        through_statistics = training and needs[0]
        with torch.cuda.device_of(grad):
            batch_norm_bwd_apply[(tiles * blocks,)](
                grad,
                x if through_statistics else None,
                positive,
                mean,
                var,
                weight,
                of_weight,
                of_bias,
                gradients[0] if needs[0] else None,
                gradients[1] if needs[1] else None,
                rows_of(grad),
                grad.shape[1] // GROUP,
                eps,
                TRAINING=through_statistics,
                **options,
            )
    return gradients


def _triton_sums(
    grad: Tensor,
    x: Tensor,
    positive: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    of_weight: Tensor,
    of_bias: Tensor,
) -> None:
    from rtk.kernels.batch_norm_act import batch_norm_bwd_sums, batch_norm_bwd_weights

    channels = x.shape[1]
    blocks, options = tiling(x, 2)
    parts, tiles_a_part = split_rows(x, blocks, options["U"] * options["R"])
    partial = torch.empty((parts, 2, channels), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        batch_norm_bwd_sums[(parts * blocks,)](
            grad,
            x,
            positive,
            mean,
            partial,
            rows_of(x),
            channels // GROUP,
            tiles_a_part,
            **options,
        )
        batch_norm_bwd_weights[(-(-channels // JOIN["BLOCK_C"]),)](
            partial, var, of_weight, of_bias, parts, channels, eps, **JOIN
        )


@batch_norm_act_bwd_op.implementation("reference")
def _reference(
    grad: Tensor,
    x: Tensor | None,
    positive: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    training: bool,
    eps: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradients = _fake(grad, x, positive, mean, var, weight, training, eps, needs)
    exact = exact_dtype(grad)
    behind = grad.to(exact)
    if positive is not None:
        behind = behind.masked_fill(~unpack(positive, grad.shape[1]), 0)
    if needs[1]:
        gradients[1].copy_(behind)
    inverse = (shaped(var, exact) + eps).rsqrt()
    x_grad = behind
    if sums_needed(training, needs):
        assert x is not None
        normalised = (x.to(exact) - shaped(mean, exact)) * inverse
        of_weight, of_bias = (behind * normalised).sum((0, 2, 3)), behind.sum((0, 2, 3))
        for needed, gradient, value in zip(
            needs[2:], gradients[2:], (of_weight, of_bias), strict=True
        ):
            if needed:
                gradient.copy_(value)
        if training:
            through = shaped(of_bias, exact) + normalised * shaped(of_weight, exact)
            x_grad = behind - through / max(1, rows_of(grad))
    if needs[0]:
        scale = inverse if weight is None else inverse * shaped(weight, exact)
        gradients[0].copy_(x_grad * scale)
    return gradients
