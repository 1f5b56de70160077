"""torchvision's and timm's own state_dicts, and any network's under their keys."""

from __future__ import annotations

import re
from collections.abc import Collection

from rtk.config import ConvertConfig
from rtk.convert.formats import (
    FORMATS,
    PLAIN,
    Foreign,
    Format,
    State,
    take_normaliser,
    torchvision_names,
)

# Auxiliary classifiers of GoogLeNet and Inception, which only training ever read.
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
# DenseNets of before torchvision 0.3, which are the published ones: denselayer1.norm.1.weight.
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")


def _read(state: State, config: ConvertConfig) -> Foreign:
    state = torchvision_names(state)
    found = Foreign({}, *take_normaliser(state))
    for key, tensor in state.items():
        if not key.startswith(_AUXILIARY):
            found.state[_OLD_DENSENET.sub(r"\1\2", key)] = tensor
    if len(found.state) < len(state):
        found.notes.append("the auxiliary classifiers are left out")
    return found


def _recognises(keys: Collection[str]) -> bool:
    return False  # torchvision is what remains, timm is asked for


FORMATS.register(PLAIN)(Format(_recognises, _read, pretrain="natural"))
FORMATS.register("timm")(Format(_recognises, _read, pretrain="natural"))
