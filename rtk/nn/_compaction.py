"""CompactionReport: what compact made of a network, layer by layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Size = tuple[int, int]


@dataclass(frozen=True)
class CompactedLayer:
    """A convolution or linear layer, before and after.

    Attributes:
        name: its path in the model.
        before, after: (inputs, outputs), channels or features.
        idle: outputs that are computed although all their weights are 0, because they are added
            to others that are not, or something reads them that was not understood.
        macs_before, macs_after: multiply-accumulates on the example input; None without one.
    """

    name: str
    before: Size
    after: Size
    idle: int
    macs_before: int | None = None
    macs_after: int | None = None


@dataclass(frozen=True)
class CompactionReport:
    """What `compact` made of a network; print it for a table.

    Attributes:
        layers: every convolution and linear layer, in the model's order.
        left: layer or function that was not understood, so that what it reads stayed -> why.
        parameters_before, parameters_after: of the whole model.
    """

    layers: list[CompactedLayer] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    parameters_before: int = 0
    parameters_after: int = 0

    @property
    def parameters_left(self) -> float:
        """The fraction of the parameters that is left."""
        return self.parameters_after / max(1, self.parameters_before)

    @property
    def flops_left(self) -> float | None:
        """The fraction of the multiply-accumulates that is left; None without an example input."""
        before = [layer.macs_before for layer in self.layers if layer.macs_before is not None]
        after = [layer.macs_after for layer in self.layers if layer.macs_after is not None]
        return sum(after) / max(1, sum(before)) if before else None

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=0)
        lines = []
        for layer in self.layers:
            (i, o), (new_i, new_o) = layer.before, layer.after
            idle = f", {layer.idle} of them idle" if layer.idle else ""
            lines.append(f"{layer.name:{width}}  {i} -> {o}: {new_i} -> {new_o}{idle}")
        lines += [f"left as it is: {name}: {why}" for name, why in self.left.items()]
        lines.append(f"parameters left: {self.parameters_left:.1%}")
        if self.flops_left is not None:
            lines.append(f"FLOPs left: {self.flops_left:.1%}")
        return "\n".join(lines)


def layers_of(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """Return name -> convolution or linear layer."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def size_of(layer: nn.Conv2d | nn.Linear) -> Size:
    """Return a layer's (inputs, outputs)."""
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    return layer.in_features, layer.out_features


def idle_outputs(layer: nn.Conv2d | nn.Linear) -> int:
    """Return how many outputs have no weight that is not 0."""
    return int((layer.weight.detach() == 0).flatten(1).all(1).sum())


@contextlib.contextmanager
def counted_macs(model: nn.Module) -> Iterator[dict[str, int]]:
    """Count multiply-accumulates, layer by layer, of the forwards in the `with`."""
    counts: dict[str, int] = {}

    def count(name: str) -> Any:
        def hook(layer: nn.Conv2d | nn.Linear, _: Any, output: torch.Tensor) -> None:
            filters = layer.weight.numel() // layer.weight.shape[0]
            counts[name] = counts.get(name, 0) + output.numel() * filters

        return hook

    handles = [m.register_forward_hook(count(name)) for name, m in layers_of(model).items()]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
