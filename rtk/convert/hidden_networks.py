"""allenai/hidden-networks and GATECH-EIC/Robust-Scratch-Ticket: frozen weights and scores.

A layer keeps the weights with the largest |score|. How many is an argument of theirs (kept in one
class, pruned in another) that the file does not hold, so a ticket needs `sparsity`. Scores of one
value a filter, kernel or row are tickets of that granularity.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from rtk import ops
from rtk.config import ConvertConfig
from rtk.convert.formats import (
    FORMATS,
    Foreign,
    Format,
    State,
    take_normaliser,
    torchvision_names,
)
from rtk.errors import RtkError


def _recognises(keys: Collection[str]) -> bool:
    return any(key.endswith(".scores") for key in keys)


def _read(state: State, config: ConvertConfig) -> Foreign:
    state = torchvision_names(state)
    mean, std = take_normaliser(state)
    scores = {k.removesuffix(".scores"): t for k, t in state.items() if k.endswith(".scores")}
    rest = {key: tensor for key, tensor in state.items() if not key.endswith(".scores")}
    found = Foreign(rest, mean, std)
    for layer, values in scores.items():
        weight = state.get(f"{layer}.weight")
        if weight is None or values.shape != weight.shape[: values.dim()]:
            got = "no weight" if weight is None else f"a weight {tuple(weight.shape)}"
            raise RtkError(
                f"{config.file}: the scores of {layer!r} are {tuple(values.shape)}, beside {got}; "
                "expected one for each weight, row, kernel or filter"
            )
        mask = _mask(values, config.sparsity)
        if mask is not None:
            found.masks[layer] = mask.reshape(mask.shape + (1,) * (weight.dim() - mask.dim()))
    if not found.masks:
        found.notes.append(
            "the scores are left out: --sparsity S makes a ticket of the best 1 - S of each layer"
        )
    return found


def _mask(scores: Tensor, sparsity: float | None) -> Tensor | None:
    """Return the bool mask of the best scores; scores of 0 and 1 are a mask already (RST)."""
    if bool(((scores == 0) | (scores == 1)).all()) and bool((scores == 0).any()):
        return scores == 1
    if sparsity is None:
        return None
    count = scores.numel()
    return ops.topk_mask(scores.abs().to(torch.float32), count - round(sparsity * count))


FORMATS.register("hidden-networks")(Format(_recognises, _read))
