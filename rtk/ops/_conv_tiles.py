"""Tiles of the Hopper kernel of `fused_conv2d`: which ones suit a convolution, which is fastest.

N C H W input, K output channels, R S filter. The kernel is csrc/cuda/fused_conv2d.cu; what a tile
means is explained there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

_PROCESSORS = 132  # of an H100 SXM and an H200: only a guess at what is fast depends on it
_WASTE = 1.25  # tiles that compute more than this times the best one's pixels are not tried
_BOXES = 4  # of a tile's shape that are tried


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
    padding: int
    upsample: int
    residual_stride: int  # 0: no residual
    gated: bool
    live_log2: int | None = None  # of the share of weights that is not skipped; None: all, dense

    @property
    def flat(self) -> bool:
        """Whether it is a plain matrix product over all pixels."""
        return (self.r, self.stride, self.upsample) == (1, 1, 1) and self.residual_stride < 2


@dataclass(frozen=True)
class Tile:
    """A tile: `channels` wide, `blocks` times 64 pixels a warpgroup, in a box of pixels.

    `halo` fetches the box once with its border; `resident` keeps all weights in shared memory. The
    box has 2**images_log2 images, 2**columns_log2 columns, and as many rows as remain.

    With `narrow_columns`, one of `NARROW`: 8 images x so many columns x 1 row of a kernel of its
    own, csrc/cuda/narrow_conv2d.cu; nothing else counts then.
    """

    channels: int
    blocks: int
    halo: bool
    resident: bool
    images_log2: int
    columns_log2: int
    narrow_columns: int = 0

    @property
    def pixels(self) -> int:
        """Output pixels of a tile: two warpgroups share one unless the weights are resident."""
        if self.narrow_columns:
            return 8 * self.narrow_columns
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
            self.narrow_columns,
        )


NARROW = tuple(Tile(64, 1, False, True, 3, 0, columns) for columns in (14, 16))
_SHAPES = ((64, 1), (64, 2), (128, 1), (128, 2), (256, 1))


def _covered(size: int, part: int) -> int:
    return -(-size // part) * part


def _pixels(problem: Problem, tile: Tile) -> int:
    """Pixels that all tiles together compute, what hangs over the image's edges included."""
    if problem.flat:
        return _covered(problem.n * problem.out_h * problem.out_w, tile.pixels)
    images = 1 << tile.images_log2
    columns = tile.narrow_columns or 1 << tile.columns_log2
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


def _is_narrow(problem: Problem) -> bool:
    """Return whether the kernel of the narrow tiles takes it."""
    taken = (problem.k, problem.r, problem.stride, problem.upsample) == (64, 3, 1, 1)
    return taken and problem.c <= 64 and problem.residual_stride < 2


def candidates(problem: Problem, fits: Callable[[Tile], bool] = lambda tile: True) -> list[Tile]:
    """Return the tiles worth timing among those that have room in shared memory."""
    found = list(NARROW) if _is_narrow(problem) else []
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
    # Before the waste is compared: else all that is left might not fit.
    work = {tile: _pixels(problem, tile) for tile in found if fits(tile)}
    least = min(work.values())
    shapes: dict[tuple[object, ...], list[Tile]] = {}
    for tile in sorted(work, key=lambda tile: (work[tile], tile.images_log2)):
        if work[tile] <= _WASTE * least:
            shapes.setdefault((tile.arguments[:4], tile in NARROW), []).append(tile)
    return [tile for boxes in shapes.values() for tile in _spread(boxes)]


def _spread(boxes: list[Tile]) -> list[Tile]:
    """Return some of them from end to end: neighbours are about as fast as each other."""
    step = (len(boxes) - 1) / (_BOXES - 1)
    return boxes if step <= 1 else [boxes[round(i * step)] for i in range(_BOXES)]


def _reaching(size: int, part: int, taps: int, padding: int) -> float:
    """Return the share of the taps along one side that see the image, over tiles of `part`."""
    last = size + taps - 1 - 2 * padding - 1  # of the image
    firsts = [first + tap - padding for first in range(0, size, part) for tap in range(taps)]
    return sum(first + part > 0 and first <= last for first in firsts) / len(firsts)


def _sparse_cost(problem: Problem, tile: Tile) -> float:
    """Estimate the cycles that a convolution takes whose dead blocks of weights are skipped.

    A tile waits for its products (2048 multiply-adds a cycle at best, 65 % of it where they are 64
    channels wide, as they are next to a dead block) or for its fetches (some 45 bytes a cycle from
    L2). The input of a tap is fetched where any 64 channels of the tile are live: the more, the
    wider the tile.
    """
    pixels, channels = _pixels(problem, tile), _covered(problem.k, tile.channels)
    tiles = pixels // tile.pixels * (channels // tile.channels)
    groups = tile.channels / 64
    live = 1.0 if tile.resident else 2.0 ** (problem.live_log2 or 0)
    any_live = 1 - (1 - live) ** groups
    taps = problem.r**2 / problem.upsample**2
    images, columns = 1 << tile.images_log2, tile.narrow_columns or 1 << tile.columns_log2
    rows = tile.pixels // (images * columns)
    border = problem.r - 1
    if tile.halo or tile.narrow_columns:
        boxes = 1 - (1 - any_live) ** taps
        box = images * (columns + border) * (rows + border)
    else:
        if not problem.flat and (problem.stride, problem.upsample) == (1, 1):
            for size, part in ((problem.out_h, rows), (problem.out_w, columns)):
                taps *= _reaching(size, part, problem.r, problem.padding)
        boxes, box = taps * any_live, tile.pixels
    blocks = taps * live * groups  # of weights
    chunks = -(-problem.c // 64)
    wide = live if tile.channels > 64 else 0.0  # share of products that are 128 channels wide
    products = chunks * blocks * 64 * 64 * tile.pixels / 2048 * (wide / 0.95 + (1 - wide) / 0.65)
    fetched = chunks * 128 * (boxes * box + (0 if tile.resident else blocks * 64))
    results = tile.pixels * tile.channels * 2 * (2 if problem.residual_stride else 1)
    at_once = 2 if tile.resident else 1  # tiles of a multiprocessor
    rounds = -(-tiles // (_PROCESSORS * at_once))
    return rounds * (at_once * max(products, fetched / 45) + 1000 + results / 20)


def guess(problem: Problem, fits: Callable[[Tile], bool] = lambda tile: True) -> Tile:
    """Return a good tile without timing any: as large as still keeps the multiprocessors busy."""

    def cost(tile: Tile) -> tuple[float, ...]:
        if problem.live_log2 is not None:
            return (_sparse_cost(problem, tile), tile.resident, not tile.halo)
        pixels, channels = _pixels(problem, tile), _covered(problem.k, tile.channels)
        tiles = pixels // tile.pixels * (channels // tile.channels)
        rounds = _covered(tiles, _PROCESSORS) / tiles
        # Narrow tiles are not held up by shared memory, as all others are with 64 channels.
        size = 1024 if tile in NARROW else min(tile.channels, 128) * min(tile.blocks * 2, 4)
        return (pixels * channels * rounds / (1 + size / 2048), tile.resident, not tile.halo)

    return min(candidates(problem, fits), key=cost)


_chosen: dict[tuple[int, Problem], Tile] = {}
_tuned: set[tuple[int, Problem]] = set()
_tuning = False


@contextlib.contextmanager
def tuning() -> Iterator[None]:
    """Inside the `with`, the first convolution of every kind times its tiles and keeps the best.

    It waits for the GPU, so it must not go on while a graph is captured. Later calls take what was
    found, until the process ends.
    """
    global _tuning
    previous, _tuning = _tuning, True
    try:
        yield
    finally:
        _tuning = previous


def pick(
    device: int, problem: Problem, run: Callable[[Tile], object], fits: Callable[[Tile], bool]
) -> Tile:
    """Return the tile to take: the fastest where it was or is measured now, else a guess.

    Args:
        device: the GPU's index.
        problem: what is convolved.
        run: does the convolution with a tile.
        fits: whether a tile has room in shared memory.
    """
    key = (device, problem)
    if _tuning and key not in _tuned:
        _chosen[key] = _fastest(candidates(problem, fits), run)
        _tuned.add(key)
    elif key not in _chosen:
        _chosen[key] = guess(problem, fits)
    return _chosen[key]


def _fastest(tiles: Iterable[Tile], run: Callable[[Tile], object]) -> Tile:
    times = {tile: _milliseconds(run, tile, 3) for tile in tiles}
    finalists = sorted(times, key=times.__getitem__)[:4]
    return min(finalists, key=lambda tile: _milliseconds(run, tile, 12))


def _milliseconds(run: Callable[[Tile], object], tile: Tile, rounds: int) -> float:
    run(tile)  # loads the kernel
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(rounds):
        run(tile)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / rounds
