"""The groups of weights (K, C, R, S) that are pruned together: scores, sizes and their masks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rtk.errors import RtkError
from rtk.granularity import Granularity
from rtk.nn._masked import MaskedLayer
from rtk.ops.score_step import tile_sums


def mask_shape(weight: Tensor, granularity: str) -> torch.Size:
    """Return the broadcast shape of a mask over `weight`.

    element, block and N:M (K, C, R, S), row (K, C, R, 1), kernel (K, C, 1, 1), channel
    (K, 1, 1, 1).
    """
    shared = Granularity.parse(granularity).shared
    kept = weight.dim() - shared
    return torch.Size([*weight.shape[:kept], *[1] * shared])


def group_scores(weight: Tensor, granularity: str) -> Tensor:
    """Return the mean absolute weight of each group.

    The mean, not the sum, so that layers with small groups are not favoured (RST), nor the smaller
    tiles at the edge of a block granularity.

    Returns:
        one score a group, in the mask's shape; for k x c blocks (ceil(K / k), ceil(C / c), R, S).
        N:M prunes single weights: |w|.
    """
    kind = Granularity.parse(granularity)
    scores = weight.detach().abs()
    if kind.tile:
        k, c = _within(kind.tile, weight)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # fp16 sums overflow
        sums = tile_sums(scores, k, c)
        return sums / group_sizes(weight, granularity).to(sums.device)
    dims = tuple(range(weight.dim() - kind.shared, weight.dim()))
    return scores.mean(dims, keepdim=True) if dims else scores


def group_sizes(weight: Tensor, granularity: str) -> Tensor:
    """Return how many weights each group has: int64 on the CPU, broadcasts to the scores."""
    kind = Granularity.parse(granularity)
    if kind.tile:
        k, c = (
            torch.tensor([min(size, length - at) for at in range(0, length, size)])
            for size, length in zip(_within(kind.tile, weight), weight.shape[:2], strict=True)
        )
        return (k[:, None] * c)[..., None, None]
    one = (1,) * weight.dim()
    return torch.full(one, weight.numel() // max(1, mask_shape(weight, granularity).numel()))


def expand_groups(groups: Tensor, weight: Tensor, granularity: str) -> Tensor:
    """Return the mask over `weight` out of one value a group, as `group_scores` orders them."""
    kind = Granularity.parse(granularity)
    if not kind.tile:
        return groups
    k, c = _within(kind.tile, weight)
    wide = groups.repeat_interleave(k, 0).repeat_interleave(c, 1)
    return wide[: weight.shape[0], : weight.shape[1]].contiguous()


def collapse_groups(mask: Tensor, weight: Tensor, granularity: str) -> Tensor:
    """Undo `expand_groups`: return one value a group out of a mask of that granularity."""
    kind = Granularity.parse(granularity)
    if not kind.tile:
        return mask
    k, c = _within(kind.tile, weight)
    return mask[::k, ::c]


def n_of_m_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """Return the bool mask that keeps the `n` largest |w| of every `m` consecutive input channels.

    Of equals the one with the smaller index stays. The number of channels is a multiple of m.
    """
    groups = weight.detach().abs().unflatten(1, (-1, m))
    best = groups.argsort(dim=2, descending=True, stable=True).narrow(2, 0, n)
    mask = torch.zeros(groups.shape, dtype=torch.bool, device=weight.device)
    return mask.scatter_(2, best, True).flatten(1, 2)


def prunable_layers(model: nn.Module, include_first: bool = False) -> dict[str, nn.Conv2d]:
    """Return the layers that a ticket masks: every Conv2d but the first, never the head.

    Args:
        model: any module; one of rtk's names its head, which is left out even as a convolution.
        include_first: take the first convolution too.

    Raises:
        RtkError: if nothing is left to prune.
    """
    head = getattr(model, "head_name", None)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and name != head
    }
    if layers and not include_first:
        layers.pop(next(iter(layers)))
    if not layers:
        raise RtkError(
            "the model has no convolution to prune (the first one is left out unless "
            "include_first is set)"
        )
    return layers


def check_finite(layers: Mapping[str, nn.Conv2d], scheme: str) -> None:
    """Raise an RtkError, in the name of `scheme`, for weights that are NaN or infinite."""
    for name, layer in layers.items():
        if not layer.weight.isfinite().all():
            raise RtkError(
                f"{scheme}: the weight of {name!r} holds NaN or infinity; "
                "the checkpoint is of a training that diverged"
            )


def dense_layers(model: nn.Module, include_first: bool, scheme: str) -> dict[str, nn.Conv2d]:
    """Return `prunable_layers` for a scheme that trains, and so starts from plain convolutions.

    Raises:
        RtkError: if nothing is left to prune, or a layer is masked or not finite.
    """
    layers = prunable_layers(model, include_first)
    for name, layer in layers.items():
        if isinstance(layer, MaskedLayer):
            raise RtkError(
                f"{scheme}: {name!r} is masked already; draw from the dense network, or make the "
                "mask permanent with rtk.nn.fold"
            )
    check_finite(layers, scheme)
    return layers


def _within(tile: tuple[int, int], weight: Tensor) -> tuple[int, int]:
    """Return the tile cut to the weight, which it may exceed by far."""
    return min(tile[0], weight.shape[0]), min(tile[1], weight.shape[1])
