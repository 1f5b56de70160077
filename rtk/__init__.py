"""Robust ticket kernels: draw sparse subnetworks from pretrained vision models and transfer them.

`import rtk` needs neither a GPU nor the compiled module. The ops, the layers and `Ticket` are
here at once; the stages (`rtk.pretrain`, `rtk.draw`, ...) are imported when first used.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from rtk import nn, ops
from rtk._version import __version__
from rtk.errors import RtkError
from rtk.ticket import Ticket

__all__ = [
    "RtkError",
    "Ticket",
    "__version__",
    "nn",
    "ops",
    "attacks",
    "data",
    "draw",
    "evaluate",
    "kernels",
    "models",
    "pretrain",
    "recipes",
    "report",
    "train",
    "transfer",
]
_STAGES = tuple(name for name in __all__ if name not in globals())


def __getattr__(name: str) -> ModuleType:
    if name in _STAGES:
        return importlib.import_module(f"rtk.{name}")
    raise AttributeError(f"module 'rtk' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
