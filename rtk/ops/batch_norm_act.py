"""batch_norm_act: batch norm, residual addition and ReLU in as few passes as there can be.

Three ops: `batch_norm_stats` reads the batch and updates the running statistics (the only one that
changes an argument), `batch_norm_act` applies them, and `batch_norm_act_bwd` is its gradient, in
training through the statistics, too.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rtk.ops import _compiled, _registry
from rtk.ops._layout import memory_format
from rtk.ops._registry import Op, require
from rtk.ops._triton import why_not_triton

_LAST = torch.channels_last
_GROUP = 8  # channels that a thread reads at once and that share a byte of ReLU bits


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
    kept as bits. Elsewhere this is F.batch_norm, an addition and F.relu, bit for bit.

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
    _check_call(x, residual, weight, bias, running_mean, running_var, training)
    vectors = weight, bias, running_mean, running_var
    forced = _registry._forced
    if forced == "triton" or (forced is None and _why_not_gpu(x, residual, *vectors) is None):
        return _by_ops(x, residual, *vectors, training, relu, momentum, eps, num_batches_tracked)
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    out = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        out += residual
    return F.relu_(out) if relu else out


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
        mean, var = _stats_op(x, running_mean, running_var, num_batches_tracked, momentum)
    return _op(x, residual, mean, var, weight, bias, training, eps, relu, False)[0]


def _check_like(op: str, name: str, tensor: Tensor | None, x: Tensor) -> None:
    if tensor is None:
        return
    require(
        tensor.shape == x.shape,
        "%s: %s and x must have one shape, got %s and %s",
        op,
        name,
        tuple(tensor.shape),
        tuple(x.shape),
    )
    _check_device(op, name, tensor, x)


def _check_device(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    require(
        tensor.device == x.device,
        "%s: %s is on %s and x on %s; move one with .to()",
        op,
        name,
        tensor.device,
        x.device,
    )


def _check_vectors(op: str, x: Tensor, **vectors: Tensor | None) -> None:
    require(
        x.dim() == 4 and x.is_floating_point(),
        "%s: x must be (N, C, H, W) and floating, got %s %s",
        op,
        tuple(x.shape),
        x.dtype,
    )
    for name, vector in vectors.items():
        if vector is None:
            continue
        require(
            vector.dim() == 1 and vector.shape[0] == x.shape[1],
            "%s: %s must be (C,) = (%s,), got %s",
            op,
            name,
            x.shape[1],
            tuple(vector.shape),
        )
        _check_device(op, name, vector, x)


def _check_batch(op: str, x: Tensor) -> None:
    require(
        x.numel() != x.shape[1],
        "%s: expected more than 1 value per channel when training, got %s; use larger batches, "
        "or the running statistics",
        op,
        tuple(x.shape),
    )


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
    _check_vectors(
        op, x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var
    )
    _check_like(op, "residual", residual, x)
    require(
        (running_mean is None) == (running_var is None),
        "%s: running_mean and running_var come together; give both or neither",
        op,
    )
    if training:
        _check_batch(op, x)
    else:
        require(
            running_mean is not None,
            "%s: without training it needs running_mean and running_var",
            op,
        )


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _shaped(vector: Tensor, dtype: torch.dtype) -> Tensor:
    return vector.to(dtype).view(-1, 1, 1)


# The statistics.


def _check_stats(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float,
) -> None:
    op = "batch_norm_stats"
    _check_vectors(op, x, running_mean=running_mean, running_var=running_var)
    _check_batch(op, x)
    if num_batches_tracked is not None:
        require(
            num_batches_tracked.dim() == 0 and num_batches_tracked.dtype == torch.int64,
            "%s: num_batches_tracked must be () int64, got %s %s",
            op,
            tuple(num_batches_tracked.shape),
            num_batches_tracked.dtype,
        )
        _check_device(op, "num_batches_tracked", num_batches_tracked, x)


def _empty_stats(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    size = x.shape[1]
    mean = torch.empty(size, dtype=_exact(x), device=x.device)
    return mean, torch.empty_like(mean)


_stats_op = Op(
    "batch_norm_stats(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? num_batches_tracked, float momentum) -> (Tensor, Tensor)",
    _check_stats,
    _empty_stats,
)
_stats_op.no_gradient()


def _changed(*buffers: Tensor | None) -> None:
    """Tell autograd, below which the op ran, that these have new values."""
    for buffer in buffers:
        if buffer is not None and not buffer.is_inference():
            torch.autograd.graph.increment_version(buffer)


def _why_not_gpu(x: Tensor, residual: Tensor | None, *vectors: Tensor | None) -> str | None:
    """Return why the kernels cannot take these, or None where they can."""
    given = [tensor for tensor in (x, residual, *vectors) if tensor is not None]
    reason = why_not_triton(*given) or _compiled.why_not_dtype(x, "x", *_DTYPES)
    if reason is not None:
        return reason
    if not x.is_contiguous(memory_format=_LAST):
        return "x is not channels_last"
    if x.shape[1] % _GROUP:
        return f"it takes a multiple of {_GROUP} channels, not {x.shape[1]}"
    if x.numel() == 0:
        return "there are no images"
    if residual is not None and residual.dtype != x.dtype:
        return f"the residual is {residual.dtype} and x {x.dtype}"
    for vector in vectors:
        if vector is not None and (vector.dtype != torch.float32 or not vector.is_contiguous()):
            return "weight, bias and statistics must be float32 and contiguous"
    return None


_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _why_not_stats(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, *_: object
) -> str | None:
    return _why_not_gpu(x, None, running_mean, running_var)


@functools.cache
def _programs(device: torch.device) -> int:
    """Return how many programs of 8 warps a GPU runs at once."""
    if device.type != "cuda":
        return 8  # under Triton's interpreter
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count


_WARPS = 8
_BLOCK_C = 256  # channels of a program: runs of 512 bytes in bf16


def _tiling(x: Tensor, accesses: int) -> tuple[int, dict[str, int]]:
    """Return the number of blocks of channels, and a tile with `accesses` of 16 bytes a thread."""
    channels = x.shape[1]
    block = min(_BLOCK_C, 1 << (channels - 1).bit_length())
    unrolled = max(1, accesses * 2 // x.element_size())
    threads = _WARPS * 32
    sizes = {"U": unrolled, "R": threads * _GROUP // block, "BLOCK_C": block}
    return -(-channels // block), sizes | {"num_warps": _WARPS}


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[1]


def _parts(x: Tensor, blocks: int, tile: int) -> tuple[int, int]:
    """Return into how many parts the rows are split, of how many tiles each."""
    tiles = -(-_rows(x) // tile)
    tiles_a_part = -(-tiles // max(1, _programs(x.device) // blocks))
    return -(-tiles // tiles_a_part), tiles_a_part


_JOIN = {"BLOCK_P": 128, "BLOCK_C": 8, "num_warps": 4}  # joins 128 parts of 8 channels at a time


@_stats_op.implementation("triton", _why_not_stats)
def _stats_triton(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float,
) -> tuple[Tensor, Tensor]:
    from rtk.kernels.batch_norm_act import batch_norm_statistics, batch_norm_sums

    mean, var = _empty_stats(x)
    rows, channels = _rows(x), x.shape[1]
    blocks, options = _tiling(x, 4)
    tile = options["U"] * options["R"]
    parts, tiles_a_part = _parts(x, blocks, tile)
    partial = torch.empty((parts, 2, channels), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        batch_norm_sums[(parts * blocks,)](
            x, partial, rows, channels // _GROUP, tiles_a_part, **options
        )
        batch_norm_statistics[(-(-channels // _JOIN["BLOCK_C"]),)](
            partial,
            mean,
            var,
            running_mean,
            running_var,
            num_batches_tracked,
            parts,
            tiles_a_part * tile,
            rows,
            channels,
            momentum,
            **_JOIN,
        )
    _changed(running_mean, running_var, num_batches_tracked)
    return mean, var


@_stats_op.implementation("reference")
def _stats_reference(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float,
) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x.to(_exact(x)), (0, 2, 3), correction=0)
    rows = _rows(x) if x.numel() else 0
    unbiased = var * (rows / max(rows - 1, 1))
    for buffer, batch in ((running_mean, mean), (running_var, unbiased)):
        if buffer is not None:
            buffer.copy_(momentum * batch + (1 - momentum) * buffer)
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    _changed(running_mean, running_var, num_batches_tracked)
    return mean, var


# Their application.


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
    _check_vectors(op, x, mean=mean, var=var, weight=weight, bias=bias)
    _check_like(op, "residual", residual, x)


def _empty_positive(x: Tensor, save: bool) -> Tensor:
    """Return memory for a byte of every 8 channels of every pixel, or for nothing."""
    n, c, h, w = x.shape
    size = (n, h, w, -(-c // _GROUP)) if save else (0,)
    return torch.empty(size, dtype=torch.uint8, device=x.device)


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty_like(x), _empty_positive(x, rest[-1])


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
    return _why_not_gpu(x, residual, mean, var, weight, bias)


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
        residual = residual.contiguous(memory_format=_LAST)
    blocks, options = _tiling(x, 4 if residual is None else 2)
    tiles = -(-_rows(x) // (options["U"] * options["R"]))
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
            _rows(x),
            x.shape[1] // _GROUP,
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
    exact = _exact(x)
    scale = (_shaped(var, exact) + eps).rsqrt()
    if weight is not None:
        scale = scale * _shaped(weight, exact)
    value = (x.to(exact) - _shaped(mean, exact)) * scale
    if bias is not None:
        value = value + _shaped(bias, exact)
    if residual is not None:
        value = value + residual
    out.copy_(value.relu() if relu else value)
    if save_positive:
        positive.copy_(_pack(out > 0))
    return out, positive


def _pack(positive: Tensor) -> Tensor:
    """Return (N, H, W, ceil(C / 8)) uint8 of (N, C, H, W) bool: bit i is channel 8 g + i."""
    bits = F.pad(positive.permute(0, 2, 3, 1), (0, -positive.shape[1] % _GROUP))
    place = 1 << torch.arange(_GROUP, device=bits.device)
    return (bits.unflatten(3, (-1, _GROUP)) * place).sum(4).to(torch.uint8)


def _unpack(bits: Tensor, channels: int) -> Tensor:
    """Return what `_pack` packed."""
    places = torch.arange(_GROUP, device=bits.device, dtype=torch.uint8)
    positive = ((bits[..., None] >> places) & 1).bool()
    return positive.flatten(3)[..., :channels].permute(0, 3, 1, 2)


# Its gradient.


def _check_bwd(
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
    _check_vectors(op, grad, mean=mean, var=var, weight=weight)
    if x is not None:
        _check_like(op, "grad", grad, x)
    require(
        x is not None or not (_sums_needed(training, needs)),
        "%s: it needs x for these gradients",
        op,
    )
    if positive is not None:
        wanted = _empty_positive(grad.to("meta"), True).shape
        require(
            positive.shape == wanted and positive.dtype == torch.uint8,
            "%s: positive must be what batch_norm_act saved, %s uint8, got %s %s",
            op,
            tuple(wanted),
            tuple(positive.shape),
            positive.dtype,
        )


def _sums_needed(training: bool, needs: list[bool]) -> bool:
    return (training and needs[0]) or needs[2] or needs[3]


def _fake_bwd(
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
        return _empty_like(grad) if needed else grad.new_empty(0)

    def like_vector(needed: bool) -> Tensor:
        return torch.empty_like(mean) if needed else mean.new_empty(0)

    return (
        like_images(needs[0]),
        like_images(needs[1]),
        like_vector(needs[2]),
        like_vector(needs[3]),
    )


_bwd_op = Op(
    "batch_norm_act_bwd(Tensor grad, Tensor? x, Tensor? positive, Tensor mean, Tensor var, "
    "Tensor? weight, bool training, float eps, bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _check_bwd,
    _fake_bwd,
)
_bwd_op.no_gradient()


def _why_not_bwd(
    grad: Tensor,
    x: Tensor | None,
    positive: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    *_: object,
) -> str | None:
    reason = _why_not_gpu(grad, None, mean, var, weight)
    return reason if reason is not None or x is None else _why_not_gpu(x, grad)


@_bwd_op.implementation("triton", _why_not_bwd)
def _triton_bwd(
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

    gradients = _fake_bwd(grad, x, positive, mean, var, weight, training, eps, needs)
    of_weight = of_bias = None
    if _sums_needed(training, needs):
        assert x is not None
        of_weight = gradients[2] if needs[2] else torch.empty_like(mean)
        of_bias = gradients[3] if needs[3] else torch.empty_like(mean)
        _triton_bwd_sums(grad, x, positive, mean, var, eps, of_weight, of_bias)
    if needs[0] or needs[1]:
        blocks, options = _tiling(grad, 2)
        tiles = -(-_rows(grad) // (options["U"] * options["R"]))
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
                _rows(grad),
                grad.shape[1] // _GROUP,
                eps,
                TRAINING=through_statistics,
                **options,
            )
    return gradients


def _triton_bwd_sums(
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
    blocks, options = _tiling(x, 2)
    parts, tiles_a_part = _parts(x, blocks, options["U"] * options["R"])
    partial = torch.empty((parts, 2, channels), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        batch_norm_bwd_sums[(parts * blocks,)](
            grad,
            x,
            positive,
            mean,
            partial,
            _rows(x),
            channels // _GROUP,
            tiles_a_part,
            **options,
        )
        batch_norm_bwd_weights[(-(-channels // _JOIN["BLOCK_C"]),)](
            partial, var, of_weight, of_bias, parts, channels, eps, **_JOIN
        )


@_bwd_op.implementation("reference")
def _reference_bwd(
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
    gradients = _fake_bwd(grad, x, positive, mean, var, weight, training, eps, needs)
    exact = _exact(grad)
    behind = grad.to(exact)
    if positive is not None:
        behind = behind.masked_fill(~_unpack(positive, grad.shape[1]), 0)
    if needs[1]:
        gradients[1].copy_(behind)
    inverse = (_shaped(var, exact) + eps).rsqrt()
    x_grad = behind
    if _sums_needed(training, needs):
        assert x is not None
        normalised = (x.to(exact) - _shaped(mean, exact)) * inverse
        of_weight, of_bias = (behind * normalised).sum((0, 2, 3)), behind.sum((0, 2, 3))
        for needed, gradient, value in zip(
            needs[2:], gradients[2:], (of_weight, of_bias), strict=True
        ):
            if needed:
                gradient.copy_(value)
        if training:
            through = _shaped(of_bias, exact) + normalised * _shaped(of_weight, exact)
            x_grad = behind - through / max(1, _rows(grad))
    if needs[0]:
        scale = inverse if weight is None else inverse * _shaped(weight, exact)
        gradients[0].copy_(x_grad * scale)
    return gradients


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
        needs = ctx.needs_input_grad
        sums = _sums_needed(training, [needs[0], False, needs[4], needs[5]])
        ctx.save_for_backward(x if sums else None, positive if relu else None, mean, var, weight)
        ctx.numbers = training, eps
        ctx.format = memory_format(x)
        ctx.dtypes = [None if t is None else t.dtype for t in (residual, weight, bias)]
        return out, positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: object) -> tuple[Tensor | None, ...]:
        x, positive, mean, var, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=ctx.format)
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 4, 5)]
        # Without a ReLU the residual's gradient is the output's.
        ours = [needs[0], needs[1] and positive is not None, *needs[2:]]
        gradients = list(_bwd_op(grad, x, positive, mean, var, weight, *ctx.numbers, ours))
        if needs[1] and positive is None:
            gradients[1] = grad
        for i, dtype in enumerate(ctx.dtypes, 1):
            gradients[i] = gradients[i].to(dtype) if needs[i] else None
        of_x, of_residual, of_weight, of_bias = gradients
        return (
            of_x if needs[0] else None,
            of_residual,
            None,
            None,
            of_weight,
            of_bias,
            *[None] * 4,
        )


_op.autograd(_Autograd)
