"""locuslab/smoothing and what grew out of it: Sequential(normaliser, network), keys `1.*`."""

from __future__ import annotations

from collections.abc import Collection

from rtk.config import ConvertConfig
from rtk.convert.formats import FORMATS, Foreign, Format, State, take_normaliser, without_prefix


def _recognises(keys: Collection[str]) -> bool:
    return all(key.startswith(("0.", "1.")) for key in keys) and any(
        key.startswith("1.") for key in keys
    )


def _read(state: State, config: ConvertConfig) -> Foreign:
    state = dict(state)
    mean, std = take_normaliser(state)
    if all(key.startswith("1.") for key in state):
        state = {key.removeprefix("1."): tensor for key, tensor in state.items()}
    return Foreign(without_prefix(state, "model."), mean, std)


FORMATS.register("smoothing")(Format(_recognises, _read))
