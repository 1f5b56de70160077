"""A masked linear layer on other paths than cuBLAS's, for `rtk.nn.MaskedLinear`.

N outputs, K inputs. As in `_masked_conv2d_eager` one autograd function does all of it in eager mode
and while a CUDA graph is captured. What compiles, traces, transforms or profiles, or forces a
backend, sees `prepare_weight` and `F.linear`, which is the path "cublas".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rtk.ops import _block_paths, _registry
from rtk.ops._block_paths import BLOCK_PATHS, blocks_of
from rtk.ops.prepare_weight import prepare_now

PATHS = ("cublas", *BLOCK_PATHS)
CUBLAS = ("cublas", "cublas", "cublas")  # of the forward, the input and the weight gradient


def linear(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    paths: Sequence[str],
    densities: Sequence[float],
) -> Tensor | None:
    """Return F.linear(input, weight * mask, bias), or None where that is `F.linear`'s to do.

    Args:
        input: (..., K). Its product takes a path if it is bf16, or is under autocast.
        weight: (N, K), in the input's dtype or fp32.
        mask: bool, broadcasts to the weight.
        bias: (N,), or None.
        paths: of the forward, of the input's and of the weight's gradient, one of PATHS each.
        densities: of each way the share of its path's blocks that are alive, as far as known.
    """
    tensors = input, weight, mask, bias
    if _registry.is_forced() or not _registry.unwatched(*tensors):
        return None
    if mask.dtype != torch.bool or not input.dim() or input.shape[-1] != weight.shape[1]:
        return None
    device = input.device
    if any(t is not None and t.device != device for t in tensors):
        return None
    if torch.is_autocast_enabled(device.type) and input.dtype in (torch.float32, torch.float16):
        input = input.to(torch.get_autocast_dtype(device.type))
    if input.dtype != torch.bfloat16 or not input.numel():
        return None
    if {t.dtype for t in (weight, bias) if t is not None} - {input.dtype, torch.float32}:
        return None
    if not torch.is_grad_enabled():
        paths = paths[0], *CUBLAS[1:]  # no lists for what does not come
    result: Tensor = _Linear.apply(input, weight, mask, bias, tuple(paths), tuple(densities))
    return result


def forward(
    path: str,
    blocks: Tensor | None,
    input: Tensor,
    prepared: Tensor,
    bias: Tensor | None,
    density: float,
) -> Tensor:
    """Return the layer's result; `blocks` are those of `prepared` or of its mask."""
    if path == "cublas":
        return F.linear(input, prepared, None if bias is None else bias.to(input.dtype))
    assert blocks is not None
    out = _block_paths.multiply(path, blocks, input, prepared, density)
    return out if bias is None else out.add_(bias)


def bwd_input(
    path: str, blocks: Tensor | None, grad: Tensor, prepared: Tensor, density: float
) -> Tensor:
    """Return the input's gradient."""
    if path == "cublas":
        return grad @ prepared
    assert blocks is not None
    return _block_paths.bwd_input(path, blocks, grad, prepared, density)


def bwd_weight(
    path: str,
    blocks: Tensor | None,
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    density: float,
) -> Tensor:
    """Return the weight's gradient in its dtype, masked; `blocks` are those of the mask."""
    if path == "cublas":
        rows, inputs = (t.reshape(-1, t.shape[-1]) for t in (grad, input))
        return prepare_now(rows.t() @ inputs, mask, weight.dtype, False)
    assert blocks is not None
    return _block_paths.bwd_weight(path, blocks, grad, input, weight, mask, density)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        mask: Tensor,
        bias: Tensor | None,
        paths: tuple[str, ...],
        densities: tuple[float, ...],
    ) -> Tensor:
        prepared = prepare_now(weight, mask, input.dtype, False)
        need_input, need_weight = ctx.needs_input_grad[:2]
        used = [path for path, need in zip(paths, (True, need_input, need_weight), strict=True)
                if need and path != "cublas"]  # fmt: skip
        whole = mask.expand(weight.shape)
        blocks = {path: blocks_of(path, whole) for path in dict.fromkeys(used)}
        ctx.save_for_backward(
            input if need_weight else None,
            weight,
            mask,
            prepared if need_input else None,
            blocks.get(paths[1]),
            blocks.get(paths[2]),
        )
        ctx.paths, ctx.densities = paths[1:], densities[1:]
        ctx.bias = None if bias is None else bias.dtype
        return forward(paths[0], blocks.get(paths[0]), input, prepared, bias, densities[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mask, prepared, of_input, of_weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_input = grad_weight = grad_bias = None
        if needs[0]:
            grad_input = bwd_input(ctx.paths[0], of_input, grad, prepared, ctx.densities[0])
        if needs[1]:
            given = grad, input, weight, mask, ctx.densities[1]
            grad_weight = bwd_weight(ctx.paths[1], of_weight, *given)
        if needs[3]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=ctx.bias)
        return grad_input, grad_weight, None, grad_bias, None, None
