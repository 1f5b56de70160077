"""Tiles of the Hopper kernel of `fused_conv2d`: which ones suit a convolution, which is fastest.

N C H W input, K output channels, R S filter. The kernel is csrc/cuda/fused_conv2d.cu; what a tile
means is explained there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

_PROCESSORS = 132  # of an H100 SXM and an H200: only a guess at what is fast depends on it
_WASTE = 1.25  # tiles that compute more than this times the best one's pixels are not tried


@dataclass(frozen=True)
class Problem:
    """What decides how fast a tile is; all sizes are the op's."""

    n: int
    c: int
    k: int
    r: int
    out_h: int
    out_w: int
    stride: int
    upsample: int
    residual_stride: int  # 0: no residual
    gated: bool

    @property
    def flat(self) -> bool:
        """Whether it is a plain matrix product over all pixels."""
        return (self.r, self.stride, self.upsample) == (1, 1, 1) and self.residual_stride < 2


@dataclass(frozen=True)
class Tile:
    """A tile: `channels` wide, `blocks` times 64 pixels a warpgroup, in a box of pixels.

    `halo` fetches the box once with its border; `resident` keeps all weights in shared memory. The
    box has 2**images_log2 images, 2**columns_log2 columns, and as many rows as remain.
    """

    channels: int
    blocks: int
    halo: bool
    resident: bool
    images_log2: int
    columns_log2: int

    @property
    def pixels(self) -> int:
        """Output pixels of a tile: two warpgroups share one unless the weights are resident."""
        return 64 * self.blocks * (1 if self.resident else 2)

    @property
    def arguments(self) -> tuple[int, ...]:
        """The tile as the compiled function takes it."""
        return (
            self.channels,
            self.blocks,
            int(self.halo),
            int(self.resident),
            self.images_log2,
            self.columns_log2,
        )


_SHAPES = ((64, 1), (64, 2), (128, 1), (128, 2), (256, 1))


def _covered(size: int, part: int) -> int:
    return -(-size // part) * part


def _pixels(problem: Problem, tile: Tile) -> int:
    """Pixels that all tiles together compute, what hangs over the image's edges included."""
    if problem.flat:
        return _covered(problem.n * problem.out_h * problem.out_w, tile.pixels)
    images, columns = 1 << tile.images_log2, 1 << tile.columns_log2
    step = 2 if problem.upsample == 2 or problem.residual_stride == 2 else 1
    height, width = -(-problem.out_h // step), -(-problem.out_w // step)
    rows = tile.pixels // (images * columns)
    return step**2 * _covered(problem.n, images) * _covered(height, rows) * _covered(width, columns)


def _boxes(problem: Problem, pixels: int) -> Iterator[tuple[bool, int, int]]:
    """Yield (halo, images_log2, columns_log2) for tiles of so many pixels."""
    most = pixels.bit_length() - 1
    if problem.flat:
        yield False, most, 0
        return
    if problem.r > 1 and problem.stride == 1 and problem.residual_stride < 2:
        for columns in range(4):
            yield True, 6 - columns, columns
    for images in range(3, most + 1):
        for columns in range(min(3, most - images) + 1):
            yield False, images, columns


def candidates(problem: Problem) -> list[Tile]:
    """Return the tiles worth timing, those that waste least first."""
    found = []
    for channels, blocks in _SHAPES:
        if channels > problem.k and channels > 64:
            continue
        for resident in (False, True):
            if resident and channels * problem.r**2 * _covered(problem.c, 64) * 2 > 150_000:
                continue  # bytes of shared memory: too little would be left for the input
            pixels = 64 * blocks * (1 if resident else 2)
            for halo, images, columns in _boxes(problem, pixels):
                if resident and problem.r > 1 and not halo:
                    continue
                found.append(Tile(channels, blocks, halo, resident, images, columns))
    work = {tile: _pixels(problem, tile) for tile in found}
    least = min(work.values())
    kept = [tile for tile in found if work[tile] <= _WASTE * least]
    return sorted(kept, key=lambda tile: work[tile])


def guess(problem: Problem) -> Tile:
    """Return a good tile without timing any: as large as still keeps the multiprocessors busy."""

    def score(tile: Tile) -> tuple[float, ...]:
        tiles = _pixels(problem, tile) / tile.pixels * -(-problem.k // tile.channels)
        waves = tiles / _PROCESSORS
        busy = waves / -(-tiles // _PROCESSORS)
        work = _pixels(problem, tile) * _covered(problem.k, tile.channels)
        size = min(tile.channels, 128) * min(tile.blocks * 2, 4)
        return (work / busy / (1 + size / 2048), float(tile.resident), float(not tile.halo))

    return min(candidates(problem), key=score)


_chosen: dict[tuple[int, Problem], Tile] = {}


def chosen(device: int, problem: Problem) -> Tile:
    """Return the tile to take: the one that `tune` found fastest, else a guess."""
    tile = _chosen.get((device, problem))
    if tile is None:
        tile = _chosen[device, problem] = guess(problem)
    return tile


def tune(device: int, problem: Problem, run: Callable[[Tile], object]) -> None:
    """Time every candidate once and remember the fastest for `chosen`.

    Args:
        device: the GPU's index.
        problem: what is convolved.
        run: does the convolution with a tile; raises ValueError where a tile does not fit. This
            waits for the GPU, so it must not be called while a graph is captured.
    """
    if (device, problem) in _tuned:
        return
    times = {}
    for tile in candidates(problem):
        with contextlib.suppress(ValueError):
            times[tile] = _milliseconds(run, tile, 3)
    finalists = sorted(times, key=times.__getitem__)[:4]
    _chosen[device, problem] = min(finalists, key=lambda tile: _milliseconds(run, tile, 12))
    _tuned.add((device, problem))


_tuned: set[tuple[int, Problem]] = set()


def _milliseconds(run: Callable[[Tile], object], tile: Tile, rounds: int) -> float:
    run(tile)  # loads the kernel
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(rounds):
        run(tile)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / rounds
