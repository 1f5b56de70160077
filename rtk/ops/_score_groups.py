"""Which weights of a layer share a score, as the CUDA kernel of `score_step` walks them.

Weight and gradient lie in one memory order. From the largest stride to the smallest, neighbours
that follow each other in memory become one axis where the inner one is summed over as a whole, or
neither is summed over. What a score is the sum of is then a box along at most two axes: of four
dimensions no more than two that are summed over can be apart, and a tile has no more.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

AXES = 4
NONE = (0,) * (3 * AXES + 8)  # of a layer with one score a weight


@dataclass(frozen=True)
class _Axis:
    """An axis of memory: `size` weights a `stride` apart, `box` of them under one score."""

    size: int
    box: int
    stride: int
    score_stride: int

    @property
    def count(self) -> int:
        return -(-self.size // self.box)


@functools.lru_cache(4096)
def groups_of(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    score_shape: tuple[int, ...],
    score_strides: tuple[int, ...],
    tile: tuple[int, int] | None,
) -> tuple[int, ...]:
    """Return the numbers of `ScoreGroups` (csrc/rtk.h) of a layer, one after the other.

    Args:
        shape, strides: of its weight, dense, up to AXES dimensions, none of them 0.
        score_shape, score_strides: of its scores, as many dimensions.
        tile: (k, c), or None where the scores broadcast to the weight.

    Returns:
        counts, steps and score_steps of AXES axes each, the innermost first; then of the outer and
        the inner side of a group the most, the size, the stride and the axis, two each.
    """
    axes: list[_Axis] = []  # the outermost first
    for dim in sorted(range(len(shape)), key=lambda d: -strides[d]):
        size = shape[dim]
        if size == 1:
            continue
        if tile is not None and dim < 2:
            box = min(tile[dim], size)
        else:
            box = size if score_shape[dim] == 1 else 1
        score_stride = score_strides[dim] if box < size else 0
        axis = _Axis(size, box, strides[dim], score_stride)
        joined = _join(axes[-1], axis) if axes else None
        if joined is None:
            axes.append(axis)
        else:
            axes[-1] = joined
    axes.reverse()
    sides = [(axis.box, axis.size, axis.stride, i) for i, axis in enumerate(axes) if axis.box > 1]
    axes += [_Axis(1, 1, 0, 0)] * (AXES - len(axes))
    sides += [(1, 1, 0, AXES)] * (2 - len(sides))  # after the innermost, which is the inner side
    inner, outer = sides
    return (
        *(axis.count for axis in axes),
        *(axis.box * axis.stride for axis in axes),
        *(axis.score_stride for axis in axes),
        *(number for pair in zip(outer, inner, strict=True) for number in pair),
    )


def _join(outer: _Axis, inner: _Axis) -> _Axis | None:
    """Return two neighbours in memory as one axis, or None where their groups do not allow it."""
    if outer.stride != inner.size * inner.stride:
        return None
    size = outer.size * inner.size
    if inner.box == inner.size:  # all of it belongs to one score
        return replace(outer, size=size, box=outer.box * inner.size, stride=inner.stride)
    if outer.box == inner.box == 1 and outer.score_stride == inner.size * inner.score_stride:
        return replace(inner, size=size)
    return None
