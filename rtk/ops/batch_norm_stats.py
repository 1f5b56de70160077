"""batch_norm_stats: the statistics of a batch, and the running ones updated in the same pass."""

from __future__ import annotations

import torch
from torch import Tensor

from rtk.ops._batch_norm import (
    GROUP,
    JOIN,
    check_batch,
    check_device,
    check_vectors,
    exact_dtype,
    rows_of,
    split_rows,
    tiling,
    why_not_gpu,
)
from rtk.ops._registry import Op, require


def _check(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float,
) -> None:
    op = "batch_norm_stats"
    check_vectors(op, x, running_mean=running_mean, running_var=running_var)
    check_batch(op, x)
    if num_batches_tracked is not None:
        require(
            num_batches_tracked.dim() == 0 and num_batches_tracked.dtype == torch.int64,
            "%s: num_batches_tracked must be () int64, got %s %s",
            op,
            tuple(num_batches_tracked.shape),
            num_batches_tracked.dtype,
        )
        check_device(op, "num_batches_tracked", num_batches_tracked, x)


def _empty(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    size = x.shape[1]
    mean = torch.empty(size, dtype=exact_dtype(x), device=x.device)
    return mean, torch.empty_like(mean)


batch_norm_stats_op = Op(
    "batch_norm_stats(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? num_batches_tracked, float momentum) -> (Tensor, Tensor)",
    _check,
    _empty,
)
batch_norm_stats_op.no_gradient()


def _changed(*buffers: Tensor | None) -> None:
    """Tell autograd, below which the op ran, that these have new values."""
    for buffer in buffers:
        if buffer is not None and not buffer.is_inference():
            torch.autograd.graph.increment_version(buffer)


def _why_not_triton(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, *_: object
) -> str | None:
    return why_not_gpu(x, None, running_mean, running_var)


@batch_norm_stats_op.implementation("triton", _why_not_triton)
def _triton(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float,
) -> tuple[Tensor, Tensor]:
    from rtk.kernels.batch_norm_act import batch_norm_statistics, batch_norm_sums

    mean, var = _empty(x)
    rows, channels = rows_of(x), x.shape[1]
    blocks, options = tiling(x, 4)
    tile = options["U"] * options["R"]
    parts, tiles_a_part = split_rows(x, blocks, tile)
    partial = torch.empty((parts, 2, channels), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        batch_norm_sums[(parts * blocks,)](
            x, partial, rows, channels // GROUP, tiles_a_part, **options
        )
        batch_norm_statistics[(-(-channels // JOIN["BLOCK_C"]),)](
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
            **JOIN,
        )
    _changed(running_mean, running_var, num_batches_tracked)
    return mean, var


@batch_norm_stats_op.implementation("reference")
def _reference(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float,
) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x.to(exact_dtype(x)), (0, 2, 3), correction=0)
    rows = rows_of(x) if x.numel() else 0
    unbiased = var * (rows / max(rows - 1, 1))
    for buffer, batch in ((running_mean, mean), (running_var, unbiased)):
        if buffer is not None:
            buffer.copy_(momentum * batch + (1 - momentum) * buffer)
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    _changed(running_mean, running_var, num_batches_tracked)
    return mean, var
