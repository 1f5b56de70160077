"""Every convolution of the ResNets, every granularity and density, forward and gradients.

A row is what `times` of masked_conv2d_layers.py measures, of
    rtk      layers as `mask_model` makes them, after `rtk.nn.tune`
    ready    cuDNN on weights that were masked and cast before (its weight gradient is not masked)
    masked   `F.conv2d(x, w * m)` of an fp32 weight, under autocast
    compact  channel masks only: what `rtk.nn.compact` leaves of the layer
    inner    the same where as many of its inputs are pruned (not of the stems)
each [forward, input gradient, weight gradient] in milliseconds a layer. Times of the peers do not
depend on which weights are zero: ready is measured once a shape, masked once a mask's shape.

What is known is not measured again; `of` is the density that was. Going from sparse to dense by
element, row or kernel, once `tune` takes cuDNN all three ways, denser masks take the same kernels
and cost the same. Rows and kernels of a 1x1 filter are its elements, masks that keep everything are
alike, and so are those that keep as many groups.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from masked_conv2d_layers import (
    Branches,
    Shape,
    assert_right,
    compacted,
    groups_kept,
    ours,
    plain_masked,
    random_mask,
    ready,
    shapes_of,
    times,
)
from masked_conv2d_table import Table

import rtk
from rtk.draw.granularity import mask_shape

WHAT = (
    "Masked convolutions, milliseconds a layer: [forward, input gradient, weight gradient]; bf16, "
    "channels_last, medians of replayed CUDA graphs, each way tuned; see "
    "bench/masked_conv2d_sweep.py"
)
GRANULARITIES = ("element", "row", "kernel", "channel", "block-64", "2:4")
DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.3, 0.5, 0.7, 1.0)
KEPT = ("of", "taken", "rtk", "compact", "inner")  # of a row, by those that are like it
_CUDNN = ["cudnn"] * 3
_EACH = ("channel", "block-64")  # each density has a compact layer, or blocks of its own


def networks(device: str) -> dict[str, list[Shape]]:
    """Return the convolutions of each network; on a CPU something tiny."""
    if device == "cpu":
        return {"tiny": [Shape(2, 8, 16, 6, 3), Shape(2, 16, 16, 6, 1, 2)]}
    return {
        "resnet18-32px": shapes_of("resnet18", 32, 512),
        "resnet50-224px": shapes_of("resnet50", 224, 128),
    }


def sweep(
    table: Table, device: str, only: str = "", densities: Sequence[float] = DENSITIES
) -> None:
    """Fill the table.

    Args:
        table: keeps the rows, named network/shape/granularity/density.
        device: cuda or cpu.
        only: a regular expression; cases whose name it is not found in are left out.
        densities: shares of weights that are kept, ascending.
    """
    start = time.monotonic()
    for network, shapes in networks(device).items():
        for shape in dict.fromkeys(shapes):
            for granularity in GRANULARITIES:
                named = f"{network}/{shape}/{granularity}"
                wanted = [d for d in densities if re.search(only, f"{named}/{d}")]
                if granularity == "2:4":
                    wanted = [d for d in wanted if d == 0.5 and shape.c % 4 == 0]
                if wanted:
                    _Cases(table, network, shape, shapes.count(shape), device).run(
                        granularity, wanted
                    )
            table.save()
            print(f"{time.monotonic() - start:.0f} s: {network} {shape}", flush=True)
            if device == "cuda":
                torch.cuda.empty_cache()


class _Cases:
    def __init__(self, table: Table, network: str, shape: Shape, count: int, device: str) -> None:
        self.table, self.shape, self.device = table, shape, device
        self.network, self.count = network, count

    def run(self, granularity: str, densities: Sequence[float]) -> None:
        """Measure one granularity, from sparse to dense."""
        settled: dict[str, Any] | None = None  # a row for which cuDNN is taken all ways
        by_kept: dict[int, dict[str, Any] | None] = {}  # few groups: several densities are one
        for density in densities:
            kept, groups = groups_kept(self.shape, granularity, density)
            known = by_kept.get(kept) or settled
            row = by_kept[kept] = self.table.measure(
                f"{self.network}/{self.shape}/{granularity}/{density}",
                lambda d=density, k=kept / groups, known=known: self._row(granularity, d, k, known),
            )
            if row and row["taken"] == _CUDNN and granularity not in _EACH:
                settled = row

    def _row(
        self, granularity: str, density: float, kept: float, known: dict[str, Any] | None
    ) -> dict[str, Any]:
        row = {
            "network": self.network,
            "shape": str(self.shape),
            "count": self.count,
            "granularity": granularity,
            "density": density,
            "kept": round(0.5 if granularity == "2:4" else kept, 4),
            "ready": self._ready(),
            "masked": self._masked(granularity),
        }
        known = known or self._alike(granularity, density, kept)
        if known is None:
            return row | {"of": density} | self._measured(granularity, density)
        return row | {key: known[key] for key in KEPT if key in known}

    def _alike(self, granularity: str, density: float, kept: float) -> dict[str, Any] | None:
        """Return a row of the same masks under another name."""
        one_tap = self.shape.taps == 1 and granularity in ("row", "kernel")
        everything = kept == 1 and granularity not in ("element", "channel", "2:4")
        density = 1.0 if everything else density
        if not (one_tap or everything):
            return None
        return self.table.rows.get(f"{self.network}/{self.shape}/element/{density}")

    def _measured(self, granularity: str, density: float) -> dict[str, Any]:
        torch.manual_seed(0)
        mask = random_mask(self.shape, granularity, density, self.device)
        model = ours(self.shape, mask, self.device)
        taken = _CUDNN
        if self.device == "cuda":
            found = rtk.nn.tune(model, *(self.shape.input(self.device) for _ in model.layers))
            taken = list(found[0].taken)
        assert_right(model, self.shape, mask, self.device)
        row = {"taken": taken, "rtk": times(model, self.shape, self.device)}
        if granularity == "channel":
            row["compact"] = self._compact("compact", mask)
            if self.shape.c > 3:
                row["inner"] = self._compact("inner", mask)
        return row

    def _compact(self, name: str, mask: torch.Tensor) -> list[float]:
        outputs = min(self.shape.k, -(-int(mask.sum()) // 8) * 8)
        return self._peer(
            f"{name}/{outputs}",
            lambda: compacted(self.shape, mask, self.device, inner=name == "inner"),
        )

    def _ready(self) -> list[float]:
        return self._peer("ready", lambda: ready(self.shape, self.device))

    def _masked(self, granularity: str) -> list[float]:
        form = mask_shape(torch.empty(self.shape.filters, device="meta"), granularity)

        def make() -> Branches:
            mask = random_mask(self.shape, granularity, 0.5, self.device)
            return plain_masked(self.shape, mask, self.device)

        return self._peer(f"masked/{'x'.join(map(str, form))}", make)

    def _peer(self, name: str, make: Callable[[], Branches]) -> list[float]:
        """Measure what the rows of a shape share; it is kept in the table beside them."""
        name = f"{self.network}/{self.shape}/peer/{name}"
        if name not in self.table.rows:
            model = make()
            shape = replace(self.shape, c=model.layers[0].in_channels)  # compacted: fewer
            found = times(model, shape, self.device)
            self.table.rows[name] = {"times": found}
        return self.table.rows[name]["times"]
