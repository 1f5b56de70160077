"""Opens a pickle that the user trusts, in a process of its own, and leaves its tensors.

    python -P unpickle.py FILE OUT.safetensors

Unpickling runs whatever code the file holds: this is a program, started by `rtk convert --trust`
alone, so that nothing of it happens in the process that goes on. It imports nothing of rtk.
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

try:
    import dill as pickles  # what MadryLab/robustness saves with
except ImportError:
    pickles = pickle

NEEDS_DILL = 3  # exit code
_NOT_WEIGHTS = ("optimizer", "optim", "schedule", "scheduler", "lr_scheduler", "amp", "scaler")


class _Absent:
    """Stands for an object whose class is not installed here: only tensors are wanted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> _Absent:
        return self

    def __setstate__(self, state: Any) -> None:
        pass


class _Unpickler(pickles.Unpickler):  # type: ignore[misc,name-defined]
    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            if module.split(".")[0] == "dill":
                raise
            # dill writes a function's globals as those of its module.
            return {} if name == "__dict__" else type(name, (_Absent,), {})


def _load(file: Any, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


def _read(path: str) -> Any:
    """Return what the file holds: written by torch.save, with whatever pickle, or by a pickle."""
    module = SimpleNamespace(__name__="rtk", Unpickler=_Unpickler, load=_load)
    try:
        return torch.load(path, map_location="cpu", pickle_module=module, weights_only=False)
    except RuntimeError as error:
        if "magic number" not in str(error):
            raise
    with open(path, "rb") as file:
        return _load(file)


def _collect(value: Any, name: str, tensors: dict[str, Tensor], words: dict[str, Any]) -> None:
    if isinstance(value, nn.Module):
        value = value.state_dict()
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        value = torch.from_numpy(value.copy())
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().to_dense().contiguous().clone()
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if not (name == "" and key in _NOT_WEIGHTS):
                _collect(inner, f"{name}/{key}" if name else str(key), tensors, words)
    elif isinstance(value, str) and "/" not in name:
        words[name] = value


def main(path: str, out: str) -> int:
    """Read `path`, write `out`: tensors named by their way, "state_dict/conv1.weight"."""
    tensors: dict[str, Tensor] = {}
    words: dict[str, Any] = {}
    try:
        _collect(_read(path), "", tensors, words)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "dill":
            raise
        return NEEDS_DILL
    save_file(tensors, out, metadata={"words": json.dumps(words)})
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2]))
