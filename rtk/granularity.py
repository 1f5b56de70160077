"""Granularity: which weights of a convolution (K, C, R, S) a ticket keeps or prunes together.

K output channels, C input channels, R S filter. The one place that reads a granularity's name,
and that tells whether a mask has the structure which a name claims.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from rtk.errors import RtkError, did_you_mean

TILE = 64  # channels of a plain "block", both ways: what the convolution kernels can skip

_SHARED_DIMS = {"element": 0, "row": 1, "kernel": 2, "channel": 3}
_CHOICES = (*_SHARED_DIMS, "block-64 (or block-KxC, e.g. block-16x32)", "2:4 (or another N:M)")
_NEAREST = (*_SHARED_DIMS, "block", "block-64", "2:4")
_LARGEST_M = 32  # that is looked for in masks which nobody has named


@dataclass(frozen=True)
class Granularity:
    """A granularity; `Granularity.parse` makes it out of its name.

    Args:
        name: as tickets and reports have it: element, row, kernel, channel, block-64, block-16x32,
            2:4, ...
        shared: of element, row, kernel and channel: how many trailing dimensions of the weight
            are kept or pruned together, which are 1 in the mask's shape.
        tile: of a block: its (k, c) output and input channels, at one filter tap. Where K or C is
            not a multiple, the last tiles are smaller.
        n_of_m: (N, M): of every M consecutive input channels, at one output channel and tap, N
            weights are kept.
    """

    name: str
    shared: int = 0
    tile: tuple[int, int] | None = None
    n_of_m: tuple[int, int] | None = None

    @classmethod
    def parse(cls, name: str) -> Granularity:
        """Return the granularity of that name; "block" is block-64, "block-8x8" is block-8.

        Raises:
            RtkError: for an unknown name, a tile without channels, or N:M without 0 < N < M.
        """
        if name in _SHARED_DIMS:
            return cls(name, shared=_SHARED_DIMS[name])
        if name == "block":
            return cls.block(TILE, TILE)
        if block := re.fullmatch(r"block-(\d+)(?:x(\d+))?", str(name)):
            k, c = int(block[1]), int(block[2] or block[1])
            if min(k, c) < 1:
                raise RtkError(
                    f"granularity {name!r}: expected a tile of at least 1 x 1 channels, "
                    "e.g. block-64 or block-16x32"
                )
            return cls.block(k, c)
        if pattern := re.fullmatch(r"(\d+):(\d+)", str(name)):
            n, m = int(pattern[1]), int(pattern[2])
            if not 0 < n < m:
                raise RtkError(
                    f"granularity {name!r}: expected N:M with 0 < N < M, e.g. 2:4, which keeps 2 "
                    "of every 4 input channels"
                )
            return cls(f"{n}:{m}", n_of_m=(n, m))
        raise RtkError(
            f"unknown granularity {name!r}: expected one of {', '.join(_CHOICES)}"
            f"{did_you_mean(str(name), _NEAREST)}"
        )

    @classmethod
    def block(cls, k: int, c: int) -> Granularity:
        """Return the granularity of tiles of `k` output and `c` input channels."""
        return cls(f"block-{k}" if k == c else f"block-{k}x{c}", tile=(k, c))

    @property
    def sparsity(self) -> float | None:
        """The fraction of zeros that the granularity itself fixes: 1 - N / M, else None."""
        return 1 - self.n_of_m[0] / self.n_of_m[1] if self.n_of_m else None

    def holds(self, mask: Tensor, shape: Sequence[int]) -> bool:
        """Tell whether a bool mask has this structure over a weight of `shape` (K, C, R, S).

        N:M holds where at most N of M are kept, and for a mask that prunes nothing: a layer whose
        channels do not divide by M is left dense.
        """
        if self.tile:
            return all(
                at % size == 0 for dim, size in enumerate(self.tile) for at in _changes(mask, dim)
            )
        if self.n_of_m:
            n, m = self.n_of_m
            kept = _kept_of(m, mask, shape)
            return bool(mask.all()) or (kept is not None and bool((kept <= n).all()))
        return not any(at for dim in range(4 - self.shared, 4) for at in _changes(mask, dim))


def recognise(masks: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> Granularity:
    """Return the coarsest granularity that bool masks over weights (K, C, R, S) have.

    channel, row and kernel are told by the masks' shapes, block and N:M (M up to 32, exactly N
    kept, the same in all layers that are pruned) by their values.
    """
    if masks and all(m.shape[1:] == (1, 1, 1) for m in masks):
        return Granularity.parse("channel")
    # Of a 1x1 filter all of row, kernel and element are the same: larger filters decide.
    tapped = [m for m, s in zip(masks, shapes, strict=True) if s[2] * s[3] > 1]
    if tapped and all(m.shape[2:] == (1, 1) for m in tapped):
        return Granularity.parse("kernel")
    wide = [m for m, s in zip(masks, shapes, strict=True) if s[3] > 1]
    if wide and all(m.shape[3] == 1 for m in wide):
        return Granularity.parse("row")
    return _tiled(masks) or _n_of_m(masks, shapes) or Granularity.parse("element")


def sort_key(name: str | None) -> tuple[int, tuple[int, ...], str]:
    """Return a key that sorts names, the fine before the coarse.

    None comes first, then element, row, kernel, channel, blocks by size, N:M, and what is unknown.
    """
    if name is None:
        return (-1, (), "")
    try:
        granularity = Granularity.parse(name)
    except RtkError:
        return (3, (), name)
    if granularity.tile:
        k, c = granularity.tile
        return (1, (k * c, k), name)
    if granularity.n_of_m:
        n, m = granularity.n_of_m
        return (2, (m, n), name)
    return (0, (granularity.shared,), name)


def _changes(mask: Tensor, dim: int) -> Iterator[int]:
    """Yield the indices along `dim` at which the mask is not what it is one before."""
    length = mask.shape[dim]
    if length > 1:
        differ = mask.narrow(dim, 1, length - 1) != mask.narrow(dim, 0, length - 1)
        yield from (differ.movedim(dim, 0).flatten(1).any(1).nonzero().flatten() + 1).tolist()


def _kept_of(m: int, mask: Tensor, shape: Sequence[int]) -> Tensor | None:
    """Return how many of every M input channels are kept, None where M does not divide C."""
    if shape[1] % m:
        return None
    return mask.expand(*shape).unflatten(1, (-1, m)).sum(2)


def _tiled(masks: Sequence[Tensor]) -> Granularity | None:
    """Return the largest tiles that all masks consist of; None for single weights."""
    k = c = 0  # 0: the masks do not change along that dimension, tiles of any size are right
    for mask in masks:
        k, c = math.gcd(k, *_changes(mask, 0)), math.gcd(c, *_changes(mask, 1))
        if k == c == 1:
            return None
    if k == c == 0:
        # Whole taps of layers; that whole layers go, or nothing, is no sign of blocks.
        taps = any(bool(m.any()) and not bool(m.all()) for m in masks)
        return Granularity.block(TILE, TILE) if taps else None
    k, c = k or c, c or k
    return None if k == c == 1 else Granularity.block(k, c)


def _n_of_m(masks: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> Granularity | None:
    """Return the N:M with the smallest M that every mask which prunes has exactly."""
    pruned = [(m, s) for m, s in zip(masks, shapes, strict=True) if not bool(m.all())]
    for m in range(2, _LARGEST_M + 1):
        kept: set[int] = set()
        for mask, shape in pruned:
            counts = _kept_of(m, mask, shape)
            kept |= {-1} if counts is None else {int(counts.min()), int(counts.max())}
            if len(kept) > 1:
                break
        if len(kept) == 1 and 0 < (n := kept.pop()) < m:
            return Granularity.parse(f"{n}:{m}")
    return None
