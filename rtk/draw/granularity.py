"""Granularity as data: the shape of a mask over a weight (K, C, R, S), and a group's score."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rtk.config import GRANULARITIES
from rtk.errors import RtkError, check_choice

_SHARED_DIMS = {"element": 0, "row": 1, "kernel": 2, "channel": 3}
assert tuple(_SHARED_DIMS) == GRANULARITIES


def mask_shape(weight: Tensor, granularity: str) -> torch.Size:
    """Return the broadcast shape of a mask over `weight`.

    element (K, C, R, S), row (K, C, R, 1), kernel (K, C, 1, 1), channel (K, 1, 1, 1).
    """
    shared = _SHARED_DIMS[check_choice("granularity", granularity, GRANULARITIES)]
    kept = weight.dim() - shared
    return torch.Size([*weight.shape[:kept], *[1] * shared])


def group_scores(weight: Tensor, granularity: str) -> Tensor:
    """Return the mean absolute weight of each group, in the mask's shape.

    The mean, not the sum, so that layers with small groups are not favoured (RST).
    """
    scores = weight.detach().abs()
    shared = _SHARED_DIMS[check_choice("granularity", granularity, GRANULARITIES)]
    return (
        scores.mean(tuple(range(weight.dim() - shared, weight.dim())), keepdim=True)
        if shared
        else scores
    )


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
