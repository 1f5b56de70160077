"""How long a masked convolution takes by each of its paths, forward and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rtk.nn._graph_ms import graph_ms
from rtk.nn._layer_times import Times
from rtk.nn.masked_conv2d import MaskedConv2d
from rtk.ops import tuning, turn_filter
from rtk.ops._block_paths import BLOCK_PATHS, why_not_fast
from rtk.ops._conv_paths import (
    BWD_WEIGHT_PATHS,
    CUDNN,
    DENSITY,
    NO_LISTS,
    PATHS,
    lists_of,
    reads_turned,
    takes_bwd_weight,
    whole_mask,
    why_not_bwd_weight_path,
    why_not_path,
)
from rtk.ops._layout import memory_format
from rtk.ops._registry import ops
from rtk.ops.masked_conv2d import masked_conv2d_prepared

Convolution = tuple[list[int], list[int], list[int], int]  # stride, padding, dilation, groups

Run = Callable[[str, Tensor | None, int], object]
_WhyNot = Callable[[str, MaskedConv2d, Convolution, Tensor, Tensor], str | None]

_HOPELESS = 2.0  # times the dense path's time: after a few calls, no more
_MOST_COPIES = 10  # of what a layer is timed on: as many as `graph_ms` makes calls
_MOST_LIVE = 0.75  # of the blocks, where a product of matrices may still win
_FEWER = 0.9  # times the share of larger blocks, which are faster


def path_times(
    layer: MaskedConv2d, prepared: Tensor, shape: tuple[int, ...], densities: Mapping[str, float]
) -> dict[str, Times]:
    """Measure a layer on random activations, as CUDA graph replays.

    The calls of a graph read copies of their own, so that each finds the L2 cache as it does in a
    network: what is fastest on data that are there already may be slowest on data that are not.

    Args:
        layer: on a GPU.
        prepared: its weight, masked, in bf16 and channels_last.
        shape: (N, C, H, W) of its input.
        densities: by path, the share of the blocks of `prepared` that are not all zero.

    Returns:
        By path, milliseconds of (forward, input gradient, weight gradient); None: cannot be taken,
        or is hopeless.
    """
    conv, grad, x, ways = _ways(layer, prepared, shape, densities)
    times: dict[str, Times] = {}
    for path in PATHS:
        found: list[float | None] = []
        for way, (run, given, why_not) in enumerate(ways):
            if path != "cudnn" and (
                why_not(path, layer, conv, grad, x) is not None or is_hopeless(path, densities)
            ):
                found.append(None)
                continue
            cudnn = times["cudnn"][way] if path != "cudnn" else None
            with tuning():
                found.append(ms(run, path, _sources(path, way, given), lists_of, cudnn))
        forward_ms, bwd_input_ms, bwd_weight_ms = found
        times[path] = forward_ms, bwd_input_ms, bwd_weight_ms
    return times


def rehearse(
    layer: MaskedConv2d,
    prepared: Tensor,
    shape: tuple[int, ...],
    densities: Mapping[str, float],
    paths: tuple[str, str, str],
) -> None:
    """Run the paths once, as measuring does: kernels are compiled, their tiles chosen.

    A CUDA graph that is captured later finds that done; during a capture it could not be.
    """
    *_, ways = _ways(layer, prepared, shape, densities)
    for way, (path, (run, given, _)) in enumerate(zip(paths, ways, strict=True)):
        if path != "cudnn":
            [lists] = lists_of(path, _sources(path, way, given[:1]))
            with tuning():
                run(path, lists, 0)


class _Given(NamedTuple):
    """What a call reads."""

    x: Tensor
    grad: Tensor
    weight: Tensor
    mask: Tensor
    prepared: Tensor
    turned: Tensor


def _sources(path: str, way: int, copies: Sequence[_Given]) -> list[Tensor]:
    """Return what the lists of a path of a way are made of, of each copy."""
    if way == 2:
        return [whole_mask(given.weight, given.mask) for given in copies]
    return [given.turned if reads_turned(path, way) else given.prepared for given in copies]


def _ways(
    layer: MaskedConv2d, prepared: Tensor, shape: tuple[int, ...], densities: Mapping[str, float]
) -> tuple[Convolution, Tensor, Tensor, tuple[tuple[Run, list[_Given], _WhyNot], ...]]:
    """Return the convolution, a gradient and an input, and what makes the three ways of them.

    A way is called with a path, its lists and the number of the call; beside it stand the copies
    that it reads.
    """
    turned = turn_filter(prepared)
    conv = convolution(layer)
    weight, mask = layer.weight.detach(), layer.mask
    x = torch.randn(shape, device=prepared.device, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    grad = torch.randn_like(masked_conv2d_prepared(x, weight, mask, prepared, turned, None, *conv))
    copies = [_Given(x, grad, weight, mask, prepared, turned)]
    for _ in range(count_copies(x.nbytes + grad.nbytes, x.device) - 1):
        copies.append(_Given(*(tensor.clone() for tensor in copies[0])))

    def density_of(path: str) -> float:
        return densities.get(path, DENSITY)

    def forward(path: str, lists: Tensor | None, call: int) -> Tensor:
        given = copies[call % len(copies)]
        how = (path, *CUDNN[1:]), (lists, *NO_LISTS[1:]), [density_of(path)] * 3
        return masked_conv2d_prepared(given.x, *given[2:], None, *conv, *how)

    def bwd_input(path: str, lists: Tensor | None, call: int) -> Tensor:
        given = copies[call % len(copies)]
        result: Tensor = torch.ops.rtk.masked_conv2d_bwd_input(
            given.grad, given.prepared, given.turned, shape, *conv, path, lists, density_of(path)
        )
        return result

    def bwd_weight(path: str, lists: Tensor | None, call: int) -> list[Tensor]:
        x, grad, weight, mask, *_ = copies[call % len(copies)]
        result: list[Tensor] = torch.ops.rtk.masked_conv2d_bwd_weight(
            grad, x, weight, mask, *conv, [True, False], path, lists, density_of(path)
        )
        return result

    ways: tuple[tuple[Run, list[_Given], _WhyNot], ...] = (
        (forward, copies, _why_not),
        (bwd_input, copies, _why_not),
        (bwd_weight, copies, _why_not_bwd_weight),
    )
    return conv, grad, x, ways


def count_copies(size: int, device: torch.device) -> int:
    """Return how many copies of `size` bytes the L2 cache cannot hold together."""
    if device.type != "cuda":
        return 1
    return min(_MOST_COPIES, 1 + torch.cuda.get_device_properties(device).L2_cache_size // size)


def convolution(layer: MaskedConv2d) -> Convolution:
    """Return stride, padding, dilation and groups; the padding must be in numbers."""
    stride, padding, dilation = (
        [int(size) for size in pair] for pair in (layer.stride, layer.padding, layer.dilation)
    )
    return stride, padding, dilation, layer.groups


def ms(
    run: Run,
    path: str,
    of: Sequence[Tensor],
    make_lists: Callable[[str, Sequence[Tensor]], Sequence[Tensor | None]],
    dense: float | None,
) -> float:
    """Return milliseconds of a call; the lists of all are made first, as a model's forward does.

    `dense` is what the dense path took; None measures that one.
    """

    def calls(count: int) -> None:
        for call, lists in enumerate(make_lists(path, [of[i % len(of)] for i in range(count)])):
            run(path, lists, call)

    return graph_ms(calls) if dense is None else graph_ms(calls, enough=_HOPELESS * dense)


def is_hopeless(path: str, densities: Mapping[str, float]) -> bool:
    """Whether a product of these blocks need not be timed, whose kernels take long to compile.

    Too many of them are alive, or no smaller a share than of larger ones.
    """
    if path not in BLOCK_PATHS:
        return False
    size, share = BLOCK_PATHS[path], densities.get(path, 1.0)
    larger = [densities[each] for each in BLOCK_PATHS
              if BLOCK_PATHS[each] > size and each in densities]  # fmt: skip
    return share > _MOST_LIVE or any(share > _FEWER * each for each in larger)


def _why_not(path: str, layer: MaskedConv2d, conv: Convolution, *_: Tensor) -> str | None:
    """Return why the GPU's kernel of a path other than cuDNN cannot serve the layer."""
    if layer.mask.dtype != torch.bool:
        return "its mask is learned"
    if torch.cuda.get_device_capability(layer.weight.device) != (9, 0):
        return "the kernel is for compute capability 9.0"
    if path in BLOCK_PATHS:
        return why_not_path(path, layer.weight, *conv) or _why_not_blocks(path, layer)
    k, c, taps, _s = layer.weight.shape
    multiple = 64 if path == "skip" else 8
    if c % multiple or k % multiple or taps > 3:
        return f"the kernel takes channels in multiples of {multiple}, and filters of up to 3x3"
    return why_not_path(path, layer.weight, *conv)


def _why_not_blocks(path: str, layer: MaskedConv2d) -> str | None:
    rows = layer.weight.new_empty(1, layer.weight.shape[1], dtype=torch.bfloat16)
    return why_not_fast(rows, layer.weight.detach().flatten(1), path)


def _why_not_bwd_weight(
    path: str, layer: MaskedConv2d, conv: Convolution, grad: Tensor, x: Tensor
) -> str | None:
    """Return why the GPU's kernel of a path other than cuDNN cannot make the weight gradient."""
    if path not in BWD_WEIGHT_PATHS:
        return "it is none of the weight gradient's"
    weight, mask = layer.weight, layer.mask
    if not takes_bwd_weight(path, grad, x, weight, mask, False):
        return "it takes a bool mask, and an fp32 weight in channels_last"
    reason = why_not_bwd_weight_path(path, weight, *conv)
    if path in BLOCK_PATHS:
        return reason or _why_not_blocks(path, layer)
    if reason is None:
        last = memory_format(weight) == torch.channels_last
        [words] = lists_of(path, [whole_mask(weight, mask)])
        given: tuple[Any, ...] = grad, x, words, weight.shape, *conv[:3], mask, last, 1.0
        backend = ops["conv2d_bwd_weight_live"].choose(*given).backend
        if backend != "triton":
            reason = f"the backend would be {backend}"
    return reason
