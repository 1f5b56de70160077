"""OMP: one-shot magnitude pruning. The smallest weights, or groups of them, go at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rtk import ops
from rtk.config import SCOPES, check_sparsity
from rtk.draw.granularity import group_scores, prunable_layers
from rtk.errors import RtkError, check_choice
from rtk.ops.topk_mask import descending_order
from rtk.ticket import Ticket


def omp(
    model: nn.Module,
    sparsity: float,
    granularity: str = "element",
    scope: str = "global",
    include_first: bool = False,
) -> Ticket:
    """Draw a ticket by magnitude: groups are pruned in ascending order of their mean |weight|.

    By element exactly round(sparsity * n) weights are pruned; by group as few groups as reach
    that number. Among equals the one with the larger flat index goes first, everywhere the same.

    Args:
        model: the pretrained network; it is not changed.
        sparsity: fraction of the prunable weights that become zero, in [0, 1).
        granularity: element, row, kernel or channel.
        scope: "global", one ranking over all prunable layers, or "layer", the same sparsity in
            each.
        include_first: prune the first convolution too.

    Raises:
        RtkError: for settings out of range, no prunable layer, or weights that are not finite.
    """
    check_sparsity(sparsity)
    check_choice("scope", scope, SCOPES)
    layers = prunable_layers(model, include_first)
    for name, layer in layers.items():
        if not layer.weight.isfinite().all():
            raise RtkError(
                f"omp: the weight of {name!r} holds NaN or infinity; "
                "the checkpoint is of a training that diverged"
            )
    scores = [group_scores(layer.weight, granularity) for layer in layers.values()]
    sizes = [
        layer.weight.numel() // s.numel() for layer, s in zip(layers.values(), scores, strict=True)
    ]
    if scope == "global":
        kept = _groups_kept(scores, sizes, sparsity)
        masks = ops.topk_mask_global(scores, kept)
    else:
        each = [_groups_kept([s], [size], sparsity) for s, size in zip(scores, sizes, strict=True)]
        masks = ops.topk_mask(scores, each)
    return Ticket(
        dict(zip(layers, (mask.cpu() for mask in masks), strict=True)),
        {name: tuple(layer.weight.shape) for name, layer in layers.items()},
        _meta(model, sparsity, granularity, scope, include_first),
    )


def _groups_kept(scores: Sequence[Tensor], sizes: Sequence[int], sparsity: float) -> int:
    """Return how many groups stay, so that the pruned weights just reach the asked number."""
    groups = sum(s.numel() for s in scores)
    weights = sum(s.numel() * size for s, size in zip(scores, sizes, strict=True))
    target = round(sparsity * weights)
    if target == 0:
        return groups
    if len(set(sizes)) == 1:
        return groups - -(-target // sizes[0])
    # Groups of several sizes: walk up the ranking until enough weights are gone.
    flat = torch.cat([s.reshape(-1) for s in scores])
    size_of = torch.cat([torch.full((s.numel(),), n) for s, n in zip(scores, sizes, strict=True)])
    worst_first = descending_order(flat).flip(0).cpu()
    pruned_weights = size_of[worst_first].cumsum(0)
    return groups - 1 - int(torch.searchsorted(pruned_weights, target))


def _meta(
    model: nn.Module, sparsity: float, granularity: str, scope: str, include_first: bool
) -> dict[str, Any]:
    spec: Any = getattr(model, "spec", None)
    return {
        "scheme": "omp",
        "sparsity": sparsity,
        "granularity": granularity,
        "scope": scope,
        "include_first": include_first,
        "model": None if spec is None else dataclasses.asdict(spec),
    }
