"""torch.nn.utils.prune, as CV_LTH_Pre-training and Double-Win-LTH save it: weights and masks.

`weight_orig` is the dense weight and goes into the checkpoint; the `weight_mask`s are the ticket.
"""

from __future__ import annotations

from collections.abc import Collection

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
from rtk.ticket import Ticket


def _recognises(keys: Collection[str]) -> bool:
    return any(key.endswith(("weight_orig", "weight_mask")) for key in keys)


def _read(state: State, config: ConvertConfig) -> Foreign:
    state = torchvision_names(state)
    mean, std = take_normaliser(state)
    pruned = {key.removesuffix("_orig") for key in state if key.endswith("_orig")}
    masked = {key.removesuffix("_mask") for key in state if key.endswith("_mask")}
    if alone := sorted(pruned ^ masked):
        raise RtkError(
            f"{config.file}: expected a mask for every *_orig and the other way round; only one of "
            f"the two is there for {', '.join(alone)}"
        )
    found = Foreign({}, mean, std)
    if any(name.endswith(".weight") for name in pruned):
        found.masks = dict(Ticket.from_torch_prune(state).masks)
    for key, tensor in state.items():
        name = key.removesuffix("_orig")
        if name in pruned and name != key:
            found.state[name] = tensor
            if not name.endswith(".weight"):
                found.state[name] = tensor * (state[f"{name}_mask"] != 0)
                found.notes.append(f"the mask of {name} is applied: tickets mask weights only")
        elif key.removesuffix("_mask") not in pruned:
            found.state[key] = tensor
    return found


FORMATS.register("prune")(Format(_recognises, _read))
