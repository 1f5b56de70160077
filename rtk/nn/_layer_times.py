"""What `tune` measured of a layer, and the file that keeps it."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rtk._version import __version__
from rtk.runs import atomic_write

_GAIN = 0.97  # of the dense path's time: what must be undercut
_HOST = 0.7  # milliseconds of Python that a layer costs more, both ways, once that does not do all

# Milliseconds of the forward, the input gradient and the weight gradient; None: it cannot be taken.
Times = tuple[float | None, float | None, float | None]


@dataclass(frozen=True)
class LayerTimes:
    """Of one layer on one input shape: milliseconds on prepared weights, and what is taken.

    Attributes:
        layer: its name in the model.
        shape: (N, C, H, W) of its input; of a linear layer (..., K).
        live: share of the 64 x 64 blocks of weights that are not all zero.
        times: by path, "cudnn", "skip", "sparse", "blocks32", "blocks64" and "blocks128", of a
            linear layer "cublas" and the last three: milliseconds of (forward, input gradient,
            weight gradient), the making of the lists that the path reads and the masking of the
            weight gradient included; None: it cannot be taken, or the mask leaves it no chance. Of
            a path that is more than twice as slow as the dense one it is a rough number.
    """

    layer: str
    shape: tuple[int, ...]
    live: float
    times: dict[str, Times]

    @property
    def dense(self) -> str:
        """The path that multiplies by every weight: "cudnn", of a linear layer "cublas"."""
        return "cublas" if "cublas" in self.times else "cudnn"

    @property
    def taken(self) -> tuple[str, str, str]:
        """The paths of (forward, input gradient, weight gradient) in a CUDA graph.

        Each is the fastest that undercuts the dense one by 3 %.
        """
        return self._fastest(0), self._fastest(1), self._fastest(2)

    @property
    def taken_eagerly(self) -> tuple[str, str, str]:
        """The same where every launch costs Python: the dense path, or what saves more."""
        saved = 0.0
        for way, path in enumerate(self.taken):
            dense, ms = self.times[self.dense][way], self.times[path][way]
            assert dense is not None and ms is not None
            saved += dense - ms
        return self.taken if saved > _HOST else (self.dense, self.dense, self.dense)

    def _fastest(self, way: int) -> str:
        known = {path: times[way] for path, times in self.times.items()}
        dense = known.pop(self.dense)
        assert dense is not None
        below = {path: ms for path, ms in known.items() if ms is not None and ms < _GAIN * dense}
        return min(below, key=below.__getitem__, default=self.dense)


class TimesFile:
    """What was measured before, on this GPU: a JSON file, under all that a time depends on."""

    def __init__(self, device: torch.device) -> None:
        root = os.environ.get("RTK_CACHE") or Path.home() / ".cache" / "rtk"
        self._path = Path(root) / "conv-times.json"
        gpu = torch.cuda.get_device_name(device)
        self._machine = f"rtk {__version__}, {gpu}, torch {torch.__version__}, blocks, cold"
        self._known: dict[str, Any] = {}
        with suppress(OSError, ValueError):  # none yet, or not ours: measured again
            self._known = dict(json.loads(self._path.read_text()))

    def get(self, key: str, layer: str, shape: tuple[int, ...]) -> LayerTimes | None:
        """Return what is known of a layer's sizes and sparsity, `key`, on inputs of `shape`."""
        known = self._known.get(f"{self._machine}, {shape} {key}")
        if known is None:
            return None
        times = {path: tuple(ms) for path, ms in known["times"].items()}
        return LayerTimes(layer, shape, known["live"], times)

    def put(self, key: str, times: LayerTimes) -> None:
        """Keep what was measured; `save` writes it."""
        entry = {"live": times.live, "times": times.times}
        self._known[f"{self._machine}, {times.shape} {key}"] = entry

    def save(self) -> None:
        """Write the file."""
        atomic_write(self._path, json.dumps(self._known, indent=1, sort_keys=True))
