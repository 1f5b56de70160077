"""From a file to its tensors, by name. What may run code is opened only where it is trusted."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rtk.config import ConvertConfig
from rtk.convert import unpickle
from rtk.convert.formats import State
from rtk.errors import RtkError, did_you_mean

_ENTRIES = ("model", "state_dict", "model_state_dict", "net", "network")
# What peers put beside weights and what can do nothing: numbers and arrays of numpy, whose module
# numpy 2 renamed, and an argparse.Namespace.
_NUMPY = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.zeros(1).__reduce__()[0]}
_HARMLESS: list[Any] = [
    np.dtype,
    np.ndarray,
    argparse.Namespace,
    *{type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "?")},
    *(
        (f, f"numpy.{at}.multiarray.{name}")
        for name, f in _NUMPY.items()
        for at in ("core", "_core")
    ),
]


def read_state(config: ConvertConfig) -> tuple[State, str | None]:
    """Return the network's tensors in `config.file`, and the architecture that the file names.

    Raises:
        RtkError: where the file cannot be read, is damaged, needs trust, or holds no network.
    """
    content = _content(config)
    arch = content.get("arch") if isinstance(content, Mapping) else None
    return _network(content, config), arch if isinstance(arch, str) else None


def _content(config: ConvertConfig) -> Any:
    path = Path(config.file)
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise RtkError(f"{path} cannot be read ({error.strerror})") from error
    if start[8:9] == b"{":
        return _safetensors(path)
    if not start.startswith((b"\x80", b"PK\x03\x04")):
        raise RtkError(
            f"{path} is no checkpoint that rtk can read: expected safetensors, or a file that "
            "torch.save or pickle wrote"
        )
    try:
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle's protocol: what matters is raised
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]*\w)", str(error))
        more = f"holds more than tensors ({wanted[1]})" if wanted else ""
        reason = more or "is a pickle that torch.save did not write"
    except Exception as error:  # of many kinds, and in C++ too: the file was made elsewhere
        if "magic number" not in str(error):
            raise _damaged(path, error) from error
        reason = "is a pickle that torch.save did not write"
    if config.trust:
        return _trusted(path)
    raise RtkError(
        f"{path} {reason}, so opening it can run any code that its author put in; it was not. "
        "Where you trust who made it, --trust opens it, in a process of its own, and takes the "
        "tensors"
    )


def _damaged(path: Path, error: Exception) -> RtkError:
    text = " ".join(str(error).split()) or type(error).__name__
    return RtkError(f"{path} is truncated or damaged ({text[:160]}); fetch it again")


def _safetensors(path: Path) -> State:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error
    if "sha256" in metadata and "rtk" in metadata:
        raise RtkError(f"{path} is rtk's own already; use it as it is")
    return tensors


def _trusted(path: Path) -> dict[str, Any]:
    """Return what `unpickle` found, which runs elsewhere."""
    with tempfile.TemporaryDirectory(prefix="rtk-convert-") as folder:
        out = Path(folder, "tensors.safetensors")
        done = subprocess.run(
            # -P: the program's own folder is not where its imports are looked for.
            [sys.executable, "-P", unpickle.__file__, str(path.resolve()), str(out)],
            cwd=folder,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode == unpickle.NEEDS_DILL:
            raise RtkError(
                f"{path} was saved with dill, which is not installed: pip install 'rtk[dill]'"
            )
        if done.returncode or not out.exists():
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise RtkError(f"{path} could not be unpickled ({lines[-1][:200]})")
        with safe_open(out, "pt") as file:
            content: dict[str, Any] = json.loads((file.metadata() or {})["words"])
            for name in file.keys():  # noqa: SIM118
                _put(content, name.split("/"), file.get_tensor(name))
    return content


def _put(content: dict[str, Any], way: list[str], tensor: Tensor) -> None:
    for step in way[:-1]:
        inner = content.setdefault(step, {})
        if not isinstance(inner, dict):
            return
        content = inner
    content[way[-1]] = tensor


def _tensors(value: Any) -> State:
    if not isinstance(value, Mapping):
        return {}
    return {str(key): tensor for key, tensor in value.items() if isinstance(tensor, Tensor)}


def _network(content: Any, config: ConvertConfig) -> State:
    """Return the state_dict in what a file holds: all of it, or one of its entries."""
    if config.entry is not None:
        entries = list(content) if isinstance(content, Mapping) else []
        if config.entry not in entries or not _tensors(content[config.entry]):
            near = did_you_mean(config.entry, map(str, entries))
            raise RtkError(
                f"{config.file} has no entry {config.entry!r} with tensors; it has "
                f"{', '.join(map(str, entries)) or 'none'}{near}"
            )
        return _tensors(content[config.entry])
    if isinstance(content, Mapping):
        for entry in _ENTRIES:
            if found := _tensors(content.get(entry)):
                return found
        if len(found := _tensors(content)) > 1:
            return found
        inside = [name for name, value in content.items() if _tensors(value)]
        if len(inside) == 1:
            return _tensors(content[inside[0]])
        if inside:
            raise RtkError(
                f"{config.file} holds tensors in {', '.join(map(str, inside))}; "
                "say with --entry which is the network"
            )
    raise RtkError(f"{config.file} holds no network: expected tensors by name, got none")
