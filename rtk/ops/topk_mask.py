"""topk_mask and topk_mask_global: bool masks with exactly k True, deterministic under ties."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from rtk.ops import _compiled
from rtk.ops._registry import Op, require
from rtk.ops.prepare_weight import FLOATS

T = TypeVar("T")
_MOST_SCORES = 2**31 - 1  # in one launch: their indices are 32 bits


def topk_mask(scores: Tensor | Sequence[Tensor], k: int | Sequence[int]) -> Any:
    """Mark the k largest scores of each tensor.

    Larger wins; among equals the smaller flat index; -0 equals +0; NaN loses to everything. The
    result is the same on every backend. Where the same tensors are marked again and again, as in
    training, a `TopkPlan` is faster on a GPU: it remembers the last thresholds.

    Args:
        scores: a floating tensor of any shape, or a list of them.
        k: how many to keep, 0 <= k <= n; a list with one number a tensor for a list.

    Returns:
        A bool mask of the scores' shape with exactly k True, or a list of them.

    Raises:
        RtkError: for an empty list, k out of range, scores that are not floating, or on several
            devices or of several dtypes.
    """
    if isinstance(scores, Tensor):
        require(
            isinstance(k, int),
            "topk_mask: one tensor takes one k, an int, got %s",
            type(k).__name__,
        )
        return _op([scores], [k])[0]
    require(
        not isinstance(k, int),
        "topk_mask: a list of scores takes a list of k; for one k over all use topk_mask_global",
    )
    return _op(list(scores), list(k))  # type: ignore[arg-type]


def topk_mask_global(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """Mark the k largest scores over a whole list of tensors.

    The order is that of `topk_mask`; the flat index runs through the list.

    Args:
        scores: floating tensors of any shapes, one dtype and device.
        k: how many to keep in all, 0 <= k <= the number of scores.

    Returns:
        A list of bool masks of the scores' shapes, with exactly k True in all.

    Raises:
        RtkError: as for `topk_mask`.
    """
    require(
        not isinstance(scores, Tensor),
        "topk_mask_global: scores must be a list of tensors; for one tensor use topk_mask",
    )
    return _op_global(list(scores), k)


def check_scores(op: str, scores: Sequence[Tensor]) -> None:
    require(len(scores) > 0, "%s: the list of scores is empty; give at least one tensor", op)
    for tensor in scores:
        require(tensor.dtype in FLOATS, "%s: scores must be floating, got %s", op, tensor.dtype)
        require(
            tensor.dtype == scores[0].dtype and tensor.device == scores[0].device,
            "%s: scores must share one dtype and device, got %s on %s and %s on %s",
            op,
            scores[0].dtype,
            scores[0].device,
            tensor.dtype,
            tensor.device,
        )


def check_k(op: str, k: int, count: int) -> None:
    require(0 <= k <= count, "%s: k must be in [0, %s], the number of scores, got %s", op, count, k)


def _check(scores: Sequence[Tensor], k: Sequence[int]) -> None:
    check_scores("topk_mask", scores)
    require(
        len(k) == len(scores), "topk_mask: got %s tensors and %s values of k", len(scores), len(k)
    )
    for tensor, kept in zip(scores, k, strict=True):
        check_k("topk_mask", kept, tensor.numel())


def _check_global(scores: Sequence[Tensor], k: int) -> None:
    check_scores("topk_mask_global", scores)
    check_k("topk_mask_global", k, sum(tensor.numel() for tensor in scores))


def _empty(scores: Sequence[Tensor], _: Any) -> list[Tensor]:
    return [torch.empty(s.shape, dtype=torch.bool, device=s.device) for s in scores]


_op = Op("topk_mask(Tensor[] scores, SymInt[] k) -> Tensor[]", _check, _empty)
_op_global = Op("topk_mask_global(Tensor[] scores, SymInt k) -> Tensor[]", _check_global, _empty)


def why_not_cuda(scores: Sequence[Tensor], *, whole: bool) -> str | None:
    """Return why the CUDA kernel cannot take these scores, or None where it can."""
    reason = _compiled.why_not_cuda(*scores) or _compiled.why_not_dtype(
        scores[0], "scores", torch.float32, torch.bfloat16, torch.float16
    )
    if reason is None:
        most = _compiled._C.topk_mask_tensors
        for part in [scores] if whole else _split(scores, most):
            count = sum(tensor.numel() for tensor in part)
            if len(part) > most:
                return f"there are {len(part)} tensors, it takes {most} with one k"
            if count > _MOST_SCORES:
                return f"there are {count} scores, it takes {_MOST_SCORES}"
    return reason


def _split(items: Sequence[T], most: int) -> list[Sequence[T]]:
    """Cut a list into parts of at most `most`."""
    return [items[begin : begin + most] for begin in range(0, len(items), most)]


def workspace_bytes(scores: Sequence[Tensor], *, whole: bool) -> int:
    """Return how many bytes a launch over these scores works in."""
    return _compiled._C.topk_mask_workspace([tensor.numel() for tensor in scores], whole)


def launch_cuda(
    scores: Sequence[Tensor],
    k: Sequence[int],
    *,
    whole: bool,
    workspace: Tensor,
    fresh: bool,
    masks: Sequence[Tensor] = (),
    bits: Sequence[Tensor] = (),
    device_k: Tensor | None = None,
) -> None:
    """Queue one launch over at most `_C.topk_mask_tensors` tensors; csrc/rtk.h, `TopkMasks`.

    Args:
        scores: what the kernel takes (`why_not_cuda`), of any strides.
        k: one a tensor, or a single one over the `whole` list.
        whole: whether the list shares one k.
        workspace: uint8, `workspace_bytes`.
        fresh: forget what the workspace holds. Otherwise it is zero before the first call.
        masks: bool, dense, one a tensor, or none.
        bits: int32, ceil(n / 32) words a tensor, or none.
        device_k: int32, read when the kernel runs, in place of `k`.
    """
    dense = [tensor.contiguous() for tensor in scores]
    device = workspace.device
    _compiled._C.topk_mask_cuda(
        [tensor.data_ptr() for tensor in dense],
        [tensor.numel() for tensor in dense],
        [mask.data_ptr() for mask in masks],
        [words.data_ptr() for words in bits],
        k,
        0 if device_k is None else device_k.data_ptr(),
        _compiled.DTYPES[dense[0].dtype],
        whole,
        fresh,
        workspace.data_ptr(),
        device.index,
        torch.cuda.current_stream(device).cuda_stream,
    )


def _run_cuda(scores: Sequence[Tensor], k: Sequence[int], *, whole: bool) -> list[Tensor]:
    size = workspace_bytes(scores, whole=whole)
    workspace = torch.empty(size, dtype=torch.uint8, device=scores[0].device)
    masks = _empty(scores, k)
    launch_cuda(scores, k, whole=whole, workspace=workspace, fresh=True, masks=masks)
    return masks


@_op_global.implementation("cuda", lambda scores, _: why_not_cuda(scores, whole=True))
def _global_cuda(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    return _run_cuda(scores, [k], whole=True)


@_op.implementation("cuda", lambda scores, _: why_not_cuda(scores, whole=False))
def _cuda(scores: Sequence[Tensor], k: Sequence[int]) -> list[Tensor]:
    most = _compiled._C.topk_mask_tensors
    parts = zip(_split(scores, most), _split(k, most), strict=True)
    return [mask for part, kept in parts for mask in _run_cuda(part, kept, whole=False)]


def _why_not_cpu(scores: Sequence[Tensor], _: Any) -> str | None:
    return _compiled.why_not_cpu(*scores)


@_op_global.implementation("cpu", _why_not_cpu)
def _global_cpu(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    flat = [tensor.contiguous() for tensor in scores]
    masks = _empty(scores, k)
    _compiled._C.topk_mask_cpu(
        [tensor.data_ptr() for tensor in flat],
        [tensor.numel() for tensor in flat],
        [mask.data_ptr() for mask in masks],
        _compiled.DTYPES[flat[0].dtype],
        k,
        torch.get_num_threads(),
    )
    return masks


@_op.implementation("cpu", _why_not_cpu)
def _cpu(scores: Sequence[Tensor], k: Sequence[int]) -> list[Tensor]:
    return [_global_cpu([tensor], kept)[0] for tensor, kept in zip(scores, k, strict=True)]


def descending_order(scores: Tensor) -> Tensor:
    """Return the flat indices of 1-D `scores` in the order of `topk_mask`, best first."""
    values = scores + 0.0  # -0 becomes +0
    # A NaN must come after -inf, which no replacement value can say: a second, stable sort does.
    order = torch.where(values.isnan(), -torch.inf, values).argsort(descending=True, stable=True)
    return order[values[order].isnan().to(torch.uint8).argsort(stable=True)]


@_op_global.implementation("reference")
def _global_reference(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    flat = torch.cat([tensor.reshape(-1) for tensor in scores])
    mask = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
    # Not mask[...] = True: that copies the value from the host, which a graph cannot capture.
    mask.index_fill_(0, descending_order(flat)[:k], True)
    parts = mask.split([tensor.numel() for tensor in scores])
    # clone: parts of one buffer would alias each other, which an op's outputs must not.
    return [part.reshape(t.shape).clone() for part, t in zip(parts, scores, strict=True)]


@_op.implementation("reference")
def _reference(scores: Sequence[Tensor], k: Sequence[int]) -> list[Tensor]:
    return [_global_reference([tensor], kept)[0] for tensor, kept in zip(scores, k, strict=True)]
