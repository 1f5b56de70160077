"""How long a masked linear layer takes by each of its paths, forward and gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rtk.nn._layer_times import Times
from rtk.nn._path_times import Run, count_copies, is_hopeless, ms
from rtk.nn.masked_linear import MaskedLinear
from rtk.ops import _masked_linear_eager as eager
from rtk.ops._block_paths import blocks_of, why_not_blocks, why_not_fast
from rtk.ops._fused_conv2d_cuda import DENSITY


def linear_times(
    layer: MaskedLinear, prepared: Tensor, shape: tuple[int, ...], densities: Mapping[str, float]
) -> dict[str, Times]:
    """Measure a layer on random activations, as `path_times` does a convolution.

    Args:
        layer: on a GPU.
        prepared: its weight, masked, in bf16.
        shape: (..., K) of its input.
        densities: by path, the share of the blocks of `prepared` that are not all zero.

    Returns:
        By path, milliseconds of (forward, input gradient, weight gradient); None: cannot be taken,
        or is hopeless.
    """
    ways = _ways(layer, prepared, shape, densities)
    times: dict[str, Times] = {}
    for path in eager.PATHS:
        if path != "cublas" and (
            _why_not(path, layer, prepared) is not None or is_hopeless(path, densities)
        ):
            times[path] = None, None, None
            continue
        dense = times.get("cublas", (None, None, None))
        forward_ms, bwd_input_ms, bwd_weight_ms = (
            ms(run, path, masks, _lists_of, limit)
            for (run, masks), limit in zip(ways, dense, strict=True)
        )
        times[path] = forward_ms, bwd_input_ms, bwd_weight_ms
    return times


def rehearse_linear(
    layer: MaskedLinear,
    prepared: Tensor,
    shape: tuple[int, ...],
    densities: Mapping[str, float],
    paths: tuple[str, str, str],
) -> None:
    """Run the paths once, so that a CUDA graph finds their kernels compiled."""
    for path, (run, masks) in zip(paths, _ways(layer, prepared, shape, densities), strict=True):
        [blocks] = _lists_of(path, masks[:1])
        run(path, blocks, 0)


def _ways(
    layer: MaskedLinear, prepared: Tensor, shape: tuple[int, ...], densities: Mapping[str, float]
) -> list[tuple[Run, list[Tensor]]]:
    """Return what makes each way of a path, its blocks and the number of the call.

    Beside it stands what the blocks of each copy are made of.
    """
    x = torch.randn(shape, device=prepared.device, dtype=torch.bfloat16)
    grad = x.new_empty(*shape[:-1], prepared.shape[0]).normal_()
    weight, mask = layer.weight.detach(), layer.mask.expand(prepared.shape)
    bias = None if layer.bias is None else layer.bias.detach()
    copies = [(x, grad, prepared, weight, mask)]
    for _ in range(count_copies(x.nbytes + grad.nbytes, x.device) - 1):
        copies.append((x.clone(), grad.clone(), prepared.clone(), weight.clone(), mask.clone()))

    def density_of(path: str) -> float:
        return densities.get(path, DENSITY)

    def forward(path: str, blocks: Tensor | None, call: int) -> Tensor:
        x, _, prepared, _, _ = copies[call % len(copies)]
        return eager.forward(path, blocks, x, prepared, bias, density_of(path))

    def bwd_input(path: str, blocks: Tensor | None, call: int) -> Tensor:
        _, grad, prepared, _, _ = copies[call % len(copies)]
        return eager.bwd_input(path, blocks, grad, prepared, density_of(path))

    def bwd_weight(path: str, blocks: Tensor | None, call: int) -> Tensor:
        x, grad, _, weight, mask = copies[call % len(copies)]
        return eager.bwd_weight(path, blocks, grad, x, weight, mask, density_of(path))

    masks = [mask for *_, mask in copies]
    return [(run, masks) for run in (forward, bwd_input, bwd_weight)]


def _lists_of(path: str, masks: Sequence[Tensor]) -> list[Tensor | None]:
    if path == "cublas":
        return [None] * len(masks)
    return [blocks_of(path, mask) for mask in masks]


def _why_not(path: str, layer: MaskedLinear, prepared: Tensor) -> str | None:
    if layer.mask.dtype != torch.bool:
        return "its mask is learned"
    reason = why_not_blocks(path, *prepared.shape)
    return reason or why_not_fast(prepared[:1], prepared, path)
