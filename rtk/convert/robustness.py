"""MadryLab/robustness and microsoft/robust-models-transfer: an AttackerModel's state_dict.

It holds the network as `model.*` (below a wrapper for some architectures once more), the
same tensors again as `attacker.model.*`, and the normaliser.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from rtk.config import ConvertConfig
from rtk.convert.formats import (
    FORMATS,
    Foreign,
    Format,
    State,
    take_normaliser,
    torchvision_names,
    without_prefix,
)
from rtk.errors import RtkError


def _recognises(keys: Collection[str]) -> bool:
    return "normalizer.new_mean" in keys or any(key.startswith("attacker.") for key in keys)


def _read(state: State, config: ConvertConfig) -> Foreign:
    state = dict(state)
    mean, std = take_normaliser(state)
    copies = {key: state.pop(key) for key in list(state) if key.startswith("attacker.")}
    for key, copy in copies.items():
        original = state.get(key.removeprefix("attacker."))
        if key.startswith("attacker.model.") and original is not None:
            if not torch.equal(copy, original):
                raise RtkError(
                    f"{config.file}: {key} differs from its original, which cannot be of one "
                    "network; the file is damaged, or was merged from two"
                )
    return Foreign(torchvision_names(without_prefix(state, "model.")), mean, std)


FORMATS.register("robustness")(Format(_recognises, _read))
