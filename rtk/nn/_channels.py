"""Which channels of a traced network are the same channel, and which are constants in eval mode.

Every channel that a layer writes is a *slot*. Operators that work channel by channel hand slots
on, concatenations put them side by side, and additions make two slots one: a residual stream is
one set of slots with several writers. Beside its slots an activation has, channel by channel, the
constant that it is everywhere, whatever the images, or NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

NAN = float("nan")


@dataclass
class Content:
    """What a tensor in memory holds; shared by those who see a change in place."""

    constant: Tensor  # (C,) float64


@dataclass
class Channels:
    """An activation as it is seen from here.

    Attributes:
        slots: (C,) int64.
        content: its constants.
        layout: "map" (N, C, H, W), "vector" (N, C), or "flat" (N, C * H * W) with H, W unknown.
    """

    slots: Tensor
    content: Content
    layout: str

    @property
    def constant(self) -> Tensor:
        return self.content.constant

    def with_constant(self, constant: Tensor) -> Channels:
        """Return an activation of the same channels, in memory of its own."""
        return Channels(self.slots, Content(constant), self.layout)

    def expanded(self, length: int) -> Channels:
        """Return a flat activation of `length` columns as a vector."""
        if self.layout != "flat" or length % len(self.slots):
            return self
        block = length // len(self.slots)
        constant = self.constant.repeat_interleave(block)
        return Channels(self.slots.repeat_interleave(block), Content(constant), "vector")


@dataclass
class Mixing:
    """A layer whose outputs each read many channels: Conv2d without groups, or Linear.

    Attributes:
        module: the layer.
        source: (C,) the slots that it reads; None where they are not followed.
        constant: (C,) what it reads there.
        out: (K,) the slots that it writes.
        reads: (K, C) bool, whether there is a weight that is not zero.
        taps: (K, C) the sum of each filter.
        borders: whether it pads with zeros, so that a constant is seen less at the borders.
        norm: the batch norm that alone reads its result, if so.
    """

    module: nn.Conv2d | nn.Linear
    source: Tensor | None
    constant: Tensor
    out: Tensor
    reads: Tensor
    taps: Tensor
    borders: bool
    norm: nn.Module | None = None

    def outputs(self) -> Tensor:
        """Return (K,) the constants that the layer writes."""
        seen_unevenly = (self.constant != 0) if self.borders else torch.zeros_like(self.reads[0])
        varying = self.constant.isnan() | seen_unevenly
        value = vector(self.module.bias, len(self.out), 0) + self.sum_of(is_offset(self.constant))
        return value.masked_fill(self.reads[:, varying].any(1), NAN)

    def sum_of(self, channels: Tensor) -> Tensor:
        """Return (K,) float64: what constant `channels`, (C,) bool, add to each output."""
        return self.taps[:, channels].double() @ self.constant[channels]


@dataclass
class PerChannel:
    """A layer with parameters for each channel by itself: batch norm, depthwise convolution."""

    module: nn.Module
    slots: Tensor


@dataclass
class Reading:
    """What was understood of a network.

    Attributes:
        mixing, per_channel: the layers, in the order in which they run.
        parent: slot -> another that is the same channel, or itself.
        values: the slots of every activation.
        pinned: slots that something reads which was not understood.
        left: layer or function that was not understood -> why.
    """

    mixing: list[Mixing] = field(default_factory=list)
    per_channel: list[PerChannel] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    pinned: list[Tensor] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def new(self, count: int) -> Tensor:
        """Return `count` new slots."""
        start = len(self.parent)
        self.parent += range(start, start + count)
        return torch.arange(start, start + count)

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Make each slot of `a` the same channel as that of `b`."""
        for first, second in zip(a.tolist(), b.tolist(), strict=True):
            self.parent[self._root(first)] = self._root(second)

    def roots(self) -> Tensor:
        """Return slot -> the one that stands for its channel."""
        every = [self._root(slot) for slot in range(len(self.parent))]
        return torch.tensor(every, dtype=torch.int64)

    def _root(self, slot: int) -> int:
        while self.parent[slot] != slot:
            self.parent[slot] = slot = self.parent[self.parent[slot]]
        return slot


def is_offset(constant: Tensor) -> Tensor:
    """Return (C,) bool: the channels that are a constant other than 0."""
    return ~constant.isnan() & (constant != 0)


def vector(values: Any, channels: int, default: float) -> Tensor:
    """Return (C,) float64 on the CPU, full of `default` where there are no values."""
    if values is None:
        return torch.full((channels,), float(default), dtype=torch.float64)
    return values.detach().to("cpu", torch.float64)
