"""The file that stages hand to each other: safetensors plus JSON metadata, under one hash.

Checkpoints and tickets are both artefacts. The hash covers the metadata and the name, dtype,
shape and bytes of every tensor, so a truncated, bit-flipped or hand-edited file is refused
before anything of it is used. Pickles are refused by their first bytes and never opened.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from rtk._version import __version__
from rtk.errors import RtkError
from rtk.runs import atomic_write

FORMAT = 1
_PICKLE_STARTS = (b"\x80", b"PK\x03\x04", b"\x1f\x8b")  # pickle, torch.save's zip, gzip


def _digest(tensors: dict[str, Tensor], meta_json: str) -> str:
    digest = hashlib.sha256(meta_json.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        # Viewed as bytes because numpy has no bfloat16.
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save(path: str | Path, kind: str, tensors: dict[str, Tensor], meta: dict[str, Any]) -> str:
    """Write an artefact atomically and return its SHA-256.

    `kind` is "checkpoint" or "ticket"; `meta` is anything JSON can hold.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    meta = {"rtk": __version__, **meta, "kind": kind, "format": FORMAT}
    meta_json = json.dumps(meta, sort_keys=True)
    sha256 = _digest(tensors, meta_json)
    # Tensors that share memory are refused by safetensors: clone what aliases.
    seen: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        if storage in seen:
            tensors[name] = tensor.clone()
        seen.add(storage)
    atomic_write(path, save_safetensors(tensors, metadata={"rtk": meta_json, "sha256": sha256}))
    return sha256


def load(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Read an artefact and return its tensors (on the CPU), metadata and SHA-256.

    Raises RtkError where the file is missing, a pickle, truncated, altered, not rtk's, of another
    kind, or written by a newer format.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RtkError(
            f"{kind} {path} cannot be read ({error.strerror}); "
            f"give the path of a {kind} that rtk wrote"
        ) from error
    # Byte 8 of safetensors is a brace; its first byte, of the header's length, may be any.
    if data.startswith(_PICKLE_STARTS) and data[8:9] != b"{":
        raise RtkError(
            f"{kind} {path} is a pickle, which can run code when opened; rtk reads safetensors "
            "only: `rtk convert` makes a checkpoint of it"
        )
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        tensors = load_safetensors(data)
    except (SafetensorError, ValueError, UnicodeDecodeError, RecursionError) as error:
        raise RtkError(
            f"{kind} {path} is truncated or damaged ({error}); make it again or restore a copy"
        ) from error
    stored = header.get("__metadata__") or {}
    if "rtk" not in stored or "sha256" not in stored:
        raise RtkError(
            f"{kind} {path} is safetensors but was not written by rtk (no metadata); "
            "give a file that rtk itself wrote, or make one of it with `rtk convert`"
        )
    if _digest(tensors, stored["rtk"]) != stored["sha256"]:
        raise RtkError(
            f"{kind} {path} is damaged: its content does not match its SHA-256 "
            f"{stored['sha256'][:12]}...; make it again or restore a copy"
        )
    meta = json.loads(stored["rtk"])
    if meta["kind"] != kind:
        raise RtkError(f"{path} is a {meta['kind']}, expected a {kind}")
    if meta["format"] > FORMAT:
        raise RtkError(
            f"{kind} {path} has format {meta['format']}, written by rtk {meta['rtk']}; this rtk "
            f"({__version__}) reads up to {FORMAT}: upgrade rtk"
        )
    return tensors, meta, stored["sha256"]


def peek(path: str | Path) -> tuple[dict[str, Any], str] | None:
    """Return an artefact's metadata and SHA-256 without reading its tensors, so nothing is checked.

    For a look at many files; what is used is loaded. None where there is no such file.
    """
    try:
        with Path(path).open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        stored = header["__metadata__"]
        return json.loads(stored["rtk"]), stored["sha256"]
    except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError):
        return None
