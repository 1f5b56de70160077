"""Which channels must stay, so that whatever is read keeps its value."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rtk.nn._channels import Mixing, Reading, is_offset


def kept_slots(reading: Reading, multiple_of: int) -> Tensor:
    """Return (slots,) bool: the smallest set that is closed under what follows.

    A channel stays where something that was not understood reads it, or a layer's output that
    stays reads it and it is not a constant there. Of the constants that a convolution reads which
    pads with zeros, one stands for all (`representative`). Every activation has a channel, and a
    layer's number of outputs is a multiple of `multiple_of` where it has as many.
    """
    roots = reading.roots()
    kept = torch.zeros(len(roots), dtype=torch.bool)
    for slots in reading.pinned:
        kept[roots[slots]] = True
    while True:
        before = int(kept.sum())
        _close(reading, roots, kept)
        for slots in _too_few(reading, roots, kept, multiple_of):
            kept[roots[slots]] = True
        if int(kept.sum()) == before:
            return kept[roots]


def _close(reading: Reading, roots: Tensor, kept: Tensor) -> None:
    """Keep, until nothing changes, what the outputs that stay read."""
    count = -1
    while count != int(kept.sum()):
        count = int(kept.sum())
        for layer in reversed(reading.mixing):
            if layer.source is None:
                continue
            read = layer.reads[kept[roots[layer.out]]].any(0)
            needed = read & layer.constant.isnan()
            if layer.borders and (read & is_offset(layer.constant)).any():
                needed[representative(layer)] = True
            kept[roots[layer.source[needed]]] = True


def _too_few(reading: Reading, roots: Tensor, kept: Tensor, multiple_of: int) -> Iterator[Tensor]:
    """Yield slots that are not needed, but make a layer's width one that hardware takes."""
    for slots in reading.values:
        if not kept[roots[slots]].any():
            yield slots[:1]
    for layer in reading.mixing:
        stays = kept[roots[layer.out]]
        missing = -int(stays.sum()) % multiple_of
        if missing:
            yield layer.out[~stays][:missing]


def representative(layer: Mixing) -> int:
    """Return the channel that stands for all constants that a layer reads: the largest, to divide
    by."""
    return int(layer.constant.nan_to_num().abs().argmax())
