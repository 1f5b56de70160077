"""What every stage does first: pick the device, seed the generators."""

from __future__ import annotations

import random

import numpy as np
import torch

from rtk import distributed
from rtk.errors import RtkError


def resolve_device(name: str) -> torch.device:
    """Return the device for "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".

    Beside other processes (`rtk.distributed`) "auto" and "cuda" are this one's own GPU. Raises
    RtkError for another name, or a GPU that is not there.
    """
    name = distributed.own_device(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RtkError(f"unknown device {name!r}: expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise RtkError(f"device {name!r} is not supported: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RtkError(
            f"device {name!r}: torch sees {torch.cuda.device_count()} GPUs; use --device cpu, "
            "or look at `rtk doctor`"
        )
    return device


def set_threads(threads: int) -> None:
    """Let torch, and rtk's own C++, use that many CPU threads from now on; 0 changes nothing."""
    if threads > 0:
        torch.set_num_threads(threads)


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
