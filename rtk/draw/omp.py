"""OMP: one-shot magnitude pruning. The smallest weights, or groups of them, go at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rtk import ops
from rtk.config import SCOPES, check_sparsity
from rtk.draw.granularity import (
    check_finite,
    collapse_groups,
    expand_groups,
    group_scores,
    group_sizes,
    mask_shape,
    n_of_m_mask,
    prunable_layers,
)
from rtk.errors import RtkError, check_choice
from rtk.granularity import Granularity
from rtk.ops.topk_mask import descending_order
from rtk.ticket import Ticket


def omp(
    model: nn.Module,
    sparsity: float | None = None,
    granularity: str = "element",
    scope: str = "global",
    include_first: bool = False,
    *,
    within: Ticket | None = None,
) -> Ticket:
    """Draw a ticket by magnitude: groups are pruned in ascending order of their mean |weight|.

    By element exactly round(sparsity * n) weights are pruned; by group as few groups as reach
    that number. Among equals the one with the larger flat index goes first, everywhere the same.
    N:M keeps exactly N of every M input channels; layers that are grouped, or whose input channels
    do not divide by M, stay dense.

    Args:
        model: the pretrained network; it is not changed.
        sparsity: fraction of the prunable weights that become zero, in [0, 1). N:M fixes it at
            1 - N / M, and it may be left out.
        granularity: element, row, kernel, channel, block-64 (or block-KxC: tiles of K output and C
            input channels at each filter tap) or 2:4 (or another N:M).
        scope: "global", one ranking over all prunable layers, or "layer", the same sparsity in
            each. N:M is the same with both.
        include_first: prune the first convolution too.
        within: a ticket of the same layers and granularity: what it prunes stays pruned, whatever
            the weights there are by now, and counts towards `sparsity`. Not for N:M.

    Raises:
        RtkError: for settings out of range, no prunable layer (with N:M: none that divides by M),
            weights that are not finite, or a `within` of other layers or another granularity.
    """
    kind = Granularity.parse(granularity)
    sparsity = check_sparsity(sparsity, granularity)
    check_choice("scope", scope, SCOPES)
    layers = prunable_layers(model, include_first)
    check_finite(layers, "omp")
    if kind.n_of_m:
        if within is not None:
            raise RtkError(f"omp: {kind.name} keeps N of every M and cannot go on from a ticket")
        masks = _n_of_m_masks(list(layers.values()), kind)
    else:
        alive = None if within is None else _alive(within, layers, kind)
        masks = _ranked_masks(list(layers.values()), sparsity, kind, scope, alive)
    return Ticket(
        dict(zip(layers, masks, strict=True)),
        {name: tuple(layer.weight.shape) for name, layer in layers.items()},
        {"scheme": "omp", **settings_of(model, sparsity, kind.name, scope, include_first)},
    )


def _ranked_masks(
    layers: Sequence[nn.Conv2d],
    sparsity: float,
    kind: Granularity,
    scope: str,
    alive: Sequence[Tensor] | None,
) -> list[Tensor]:
    weights = [layer.weight for layer in layers]
    scores = [group_scores(weight, kind.name) for weight in weights]
    sizes = [group_sizes(weight, kind.name) for weight in weights]
    most = [score.numel() for score in scores]
    if alive is not None:
        most = [int(groups.sum()) for groups in alive]
        # Magnitudes are not negative: what is pruned ranks behind everything that is not.
        scores = [
            score.masked_fill(~groups.to(score.device), -1)
            for score, groups in zip(scores, alive, strict=True)
        ]
    # Groups of several sizes may have gone beyond the asked number already: none comes back.
    if scope == "global":
        kept = min(groups_kept(scores, sizes, sparsity), sum(most))
        groups = ops.topk_mask_global(scores, kept)
    else:
        each = [
            min(groups_kept([score], [size], sparsity), limit)
            for score, size, limit in zip(scores, sizes, most, strict=True)
        ]
        groups = ops.topk_mask(scores, each)
    return [expand_groups(g.cpu(), w, kind.name) for g, w in zip(groups, weights, strict=True)]


def _alive(within: Ticket, layers: Mapping[str, nn.Conv2d], kind: Granularity) -> list[Tensor]:
    """Return which groups of each layer `within` keeps."""
    shapes = {name: mask_shape(layer.weight, kind.name) for name, layer in layers.items()}
    theirs = {name: mask.shape for name, mask in within.masks.items()}
    if theirs != shapes or not all(
        kind.holds(within.masks[name], layer.weight.shape) for name, layer in layers.items()
    ):
        differ = sorted(n for n in shapes | theirs if shapes.get(n) != theirs.get(n))
        where = f"; masks of other shapes, or of one only: {', '.join(differ)}" if differ else ""
        raise RtkError(
            f"omp: the ticket to go on from must mask these layers by {kind.name}, got one by "
            f"{within.granularity}{where}"
        )
    return [
        collapse_groups(within.masks[name], layer.weight, kind.name)
        for name, layer in layers.items()
    ]


def _n_of_m_masks(layers: Sequence[nn.Conv2d], kind: Granularity) -> list[Tensor]:
    """The sparsity and the scope have no say: every layer that can be is pruned alike."""
    assert kind.n_of_m
    n, m = kind.n_of_m
    fits = [layer.groups == 1 and layer.weight.shape[1] % m == 0 for layer in layers]
    if not any(fits):
        raise RtkError(
            f"omp: {kind.name} needs a convolution without groups whose input channels are a "
            f"multiple of {m}, the model has none to prune; take another granularity, e.g. element"
        )
    return [
        n_of_m_mask(layer.weight, n, m).cpu()
        if fit
        else torch.ones(layer.weight.shape, dtype=torch.bool)
        for layer, fit in zip(layers, fits, strict=True)
    ]


def groups_kept(scores: Sequence[Tensor], sizes: Sequence[Tensor], sparsity: float) -> int:
    """Return how many groups stay, so that the pruned weights just reach the asked number."""
    groups = sum(s.numel() for s in scores)
    weights = sum(
        int(size.sum()) * (s.numel() // size.numel()) for s, size in zip(scores, sizes, strict=True)
    )
    target = round(sparsity * weights)
    if target == 0:
        return groups
    distinct = torch.cat([size.reshape(-1) for size in sizes]).unique().tolist()
    if len(distinct) == 1:
        return groups - -(-target // distinct[0])
    # Groups of several sizes: walk up the ranking until enough weights are gone.
    flat = torch.cat([s.reshape(-1) for s in scores])
    size_of = torch.cat(
        [size.expand(s.shape).reshape(-1) for s, size in zip(scores, sizes, strict=True)]
    )
    worst_first = descending_order(flat).flip(0).cpu()
    pruned_weights = size_of[worst_first].cumsum(0)
    return groups - 1 - int(torch.searchsorted(pruned_weights, target))


def settings_of(
    model: nn.Module, sparsity: float, granularity: str, scope: str, include_first: bool
) -> dict[str, Any]:
    """Return what a ticket's metadata says of how it was ranked, and of which network."""
    spec: Any = getattr(model, "spec", None)
    return {
        "sparsity": sparsity,
        "granularity": granularity,
        "scope": scope,
        "include_first": include_first,
        "model": None if spec is None else dataclasses.asdict(spec),
    }
