"""score_step: the scores of a learned mask, updated by straight-through SGD, all layers at once.

A function and not a `torch.library` operator, as `FoldPlan` and `TopkPlan` are none: it works in
place on lists of tensors, so that a captured CUDA graph goes on with the same memory.

K C R S weight; K output channels, C input channels, R S filter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rtk.errors import RtkError
from rtk.ops import _compiled, _registry
from rtk.ops._layout import broadcasts_to, sum_to
from rtk.ops._registry import require
from rtk.ops._score_groups import AXES, NONE, groups_of


@torch.no_grad()
def score_step(
    scores: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    tile: tuple[int, int] | None = None,
) -> None:
    """Do one SGD step on the scores of masks, in place.

    The mask's gradient is passed straight through the top-k to the scores (Ramanujan et al. 2020):
    with G the gradient of the masked weight W * mask,

        g = sum over the group of W * G + weight_decay * scores
        buffer = momentum * buffer + g
        scores = scores - lr * buffer        (nesterov: lr * (g + momentum * buffer))

    which is torch.optim.SGD on the scores, whose first step starts from a buffer of zeros.

    Args:
        scores: one floating tensor a layer that broadcasts to its weight, one score a group; with
            `tile` (ceil(K / k), ceil(C / c), R, S).
        momentum_buffers: of the scores' shapes and dtypes; 0 before the first step.
        weights: (K, C, R, S) each; they are read only.
        gradients: of the weights' shapes, fp32 or in the precision of the forward pass: dense, as
            pruned weights have a gradient too.
        lr: learning rate; a 0-dim tensor on the device may change under a captured CUDA graph.
        momentum, weight_decay, nesterov: as for torch.optim.SGD.
        tile: (k, c) output and input channels that share a score at each filter tap.

    Raises:
        RtkError: for lists of different lengths, or shapes that do not fit.

    On a GPU all layers are one launch, of fp32 scores and weights: under bf16 gradients 22 bytes of
    traffic where a weight has its own score, 6 where many share one. Sums are bit-reproducible.
    """
    _check(scores, momentum_buffers, weights, gradients, tile)
    settings = (lr, momentum, weight_decay, nesterov)
    if not scores:
        return
    if _use_cuda(scores, momentum_buffers, weights, gradients, lr, tile):
        groups = [_groups(*of_layer, tile) for of_layer in zip(scores, weights, strict=True)]
        if all(each is NONE for each in groups):
            groups, most = [], _compiled._C.score_step_tensors
        else:
            most = _compiled._C.score_groups_tensors
        for begin in range(0, len(scores), most):
            part = slice(begin, begin + most)
            of_part = scores[part], momentum_buffers[part], weights[part], gradients[part]
            _launch(*of_part, groups[part], *settings)
    else:
        _reference(scores, momentum_buffers, weights, gradients, *settings, tile)


def tile_sums(values: Tensor, k: int, c: int) -> Tensor:
    """Return the sum over each tile of `k` output and `c` input channels at one filter tap.

    Args:
        values: (K, C, R, S), floating; the last tiles are smaller where K or C is no multiple.
        k, c: at least 1.

    Returns:
        (ceil(K / k), ceil(C / c), R, S) in the values' dtype.
    """
    padded = F.pad(values, (0, 0, 0, 0, 0, -values.shape[1] % c, 0, -values.shape[0] % k))
    return padded.unflatten(1, (-1, c)).unflatten(0, (-1, k)).sum((1, 3))


def _check(
    scores: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    tile: tuple[int, int] | None,
) -> None:
    lengths = [len(each) for each in (scores, momentum_buffers, weights, gradients)]
    require(
        len(set(lengths)) == 1,
        "score_step: scores, momentum_buffers, weights and gradients must be lists of one length, "
        "got %s",
        lengths,
    )
    for score, buffer, weight, gradient in zip(
        scores, momentum_buffers, weights, gradients, strict=True
    ):
        require(
            buffer.shape == score.shape and buffer.dtype == score.dtype,
            "score_step: a momentum buffer must be %s in %s as its scores, got %s in %s",
            tuple(score.shape),
            score.dtype,
            tuple(buffer.shape),
            buffer.dtype,
        )
        require(
            gradient.shape == weight.shape,
            "score_step: a gradient must be dense, %s as its weight, got %s",
            tuple(weight.shape),
            tuple(gradient.shape),
        )
        if tile is None:
            fits = score.dim() == weight.dim() and broadcasts_to(score.shape, weight.shape)
        else:
            rows, columns = (-(-n // size) for n, size in zip(weight.shape[:2], tile, strict=True))
            fits = tuple(score.shape) == (rows, columns, *weight.shape[2:])
        require(
            fits,
            "score_step: scores must %s the weight %s, got %s",
            "broadcast to" if tile is None else f"be one a tile of {tile[0]} x {tile[1]} of",
            tuple(weight.shape),
            tuple(score.shape),
        )


def _reference(
    scores: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    tile: tuple[int, int] | None,
) -> None:
    steps = [
        _score_gradient(*of_layer, tile)
        for of_layer in zip(scores, weights, gradients, strict=True)
    ]
    if weight_decay:
        torch._foreach_add_(steps, list(scores), alpha=weight_decay)
    if momentum:
        torch._foreach_mul_(list(momentum_buffers), momentum)
        torch._foreach_add_(list(momentum_buffers), steps)
        if nesterov:
            torch._foreach_add_(steps, list(momentum_buffers), alpha=momentum)
        else:
            steps = list(momentum_buffers)
    if isinstance(lr, Tensor):  # its value must not come to the host
        torch._foreach_sub_(list(scores), torch._foreach_mul(steps, lr))
    else:
        torch._foreach_add_(list(scores), steps, alpha=-lr)


def _score_gradient(
    scores: Tensor, weight: Tensor, gradient: Tensor, tile: tuple[int, int] | None
) -> Tensor:
    product = weight.to(torch.promote_types(weight.dtype, scores.dtype)) * gradient
    summed = tile_sums(product, *tile) if tile else sum_to(product, scores.shape)
    # In the scores' own layout: the lists that follow are one kernel each only then.
    return torch.empty_like(scores).copy_(summed)


def _use_cuda(
    scores: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    lr: float | Tensor,
    tile: tuple[int, int] | None,
) -> bool:
    forced = _registry._forced
    if forced == "reference":
        return False
    reason = _why_not_cuda(scores, momentum_buffers, weights, gradients, lr, tile)
    if forced is not None and forced != "cuda":
        raise RtkError(f"score_step: there is no backend {forced!r}, only cuda, reference")
    if forced == "cuda" and reason:
        raise RtkError(f"score_step: the forced backend 'cuda' cannot: {reason}")
    return reason is None


def _why_not_cuda(
    scores: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    lr: float | Tensor,
    tile: tuple[int, int] | None,
) -> str | None:
    reason = _compiled.why_not_cuda(*scores, *momentum_buffers, *weights, *gradients)
    if reason is not None:
        return reason
    if len({tensor.device for each in (scores, weights, gradients) for tensor in each}) > 1:
        return "the tensors are on several GPUs"
    if isinstance(lr, Tensor) and not (lr.is_cuda and lr.dtype == torch.float32):
        return f"lr is a tensor in {lr.dtype} on {lr.device}, it takes fp32 on the GPU"
    for score, buffer, weight, gradient in zip(
        scores, momentum_buffers, weights, gradients, strict=True
    ):
        reason = (
            _compiled.why_not_dtype(score, "a score", torch.float32)
            or _compiled.why_not_dtype(weight, "a weight", torch.float32)
            or _compiled.why_not_dtype(gradient, "a gradient", torch.float32, torch.bfloat16)
        )
        if reason is not None:
            return reason
        if gradient.dtype != gradients[0].dtype:
            return "gradients have several dtypes"
        if weight.numel() >= 2**31:
            return f"a layer has {weight.numel()} weights, it takes 2^31 - 1"
        if score.numel() and not weight.numel():
            return "a layer has scores but no weights"
        for one, other in ((score, buffer), (weight, gradient)):
            if _order(one) is None or _order(one) != _order(other):
                return "the tensors of a layer lie in several memory orders"
        if weight.dim() > AXES and (score.shape != weight.shape or _order(score) != _order(weight)):
            return f"a weight has {weight.dim()} dimensions, it takes up to {AXES}"
    return None


def _groups(score: Tensor, weight: Tensor, tile: tuple[int, int] | None) -> tuple[int, ...]:
    """Return which weights share a score, NONE where each has its own in the same memory order."""
    alike = score.shape == weight.shape and _order(score) == _order(weight)
    if alike or not weight.numel():
        return NONE
    return groups_of(tuple(weight.shape), weight.stride(), tuple(score.shape), score.stride(), tile)


def _order(tensor: Tensor) -> tuple[int, ...] | None:
    """Return the strides of a dense tensor, 0 where they mean nothing; None if it is not dense."""
    strides = [
        (step, size) for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1
    ]
    dense = 1
    for step, size in sorted(strides):
        if step != dense:
            return None
        dense *= size
    return tuple(0 if n == 1 else s for s, n in zip(tensor.stride(), tensor.shape, strict=True))


def _launch(
    scores: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    groups: Sequence[tuple[int, ...]],
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    device = scores[0].device
    rate, rate_address = (0.0, lr.data_ptr()) if isinstance(lr, Tensor) else (lr, 0)
    _compiled._C.score_step_cuda(
        [tensor.data_ptr() for tensor in scores],
        [tensor.data_ptr() for tensor in momentum_buffers],
        [tensor.data_ptr() for tensor in weights],
        [tensor.data_ptr() for tensor in gradients],
        [tensor.numel() for tensor in weights],
        groups,
        _compiled.DTYPES[gradients[0].dtype],
        rate,
        rate_address,
        momentum,
        weight_decay,
        nesterov,
        device.index,
        torch.cuda.current_stream(device).cuda_stream,
    )
