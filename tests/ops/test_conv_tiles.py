"""The tiles of fused_conv2d's Hopper kernel: every one is right, and one is always found."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rtk.ops import _compiled, _conv_tiles, fused_conv2d, pack_positive, tuning
from rtk.ops import backend as forced
from rtk.ops._conv_output import output_shape
from rtk.ops._conv_tiles import NARROW, Problem, Tile, candidates, guess, pick
from rtk.ops._fused_conv2d_cuda import problem_of, run_cuda

HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def _nothing_chosen(monkeypatch):
    monkeypatch.setattr(_conv_tiles, "_chosen", {})
    monkeypatch.setattr(_conv_tiles, "_tuned", set())


# batch, C, (H, W), K, R; options that differ from a plain convolution that keeps the size
PROBLEMS: dict[str, tuple[tuple, dict]] = {
    "3x3": ((16, 64, (16, 16), 128, 3), {}),
    "3x3-odd-batch-and-sizes": ((5, 64, (9, 7), 64, 3), {}),
    "3x3-narrow": ((16, 64, (5, 28), 64, 3), {}),
    "3x3-7-pixels-wide": ((3, 128, (7, 7), 256, 3), {}),
    "3x3-72-channels": ((3, 72, (8, 8), 128, 3), {}),
    "3x3-stride-2": ((3, 64, (9, 7), 128, 3), {"stride": 2}),
    "3x3-residual-2": ((3, 64, (9, 7), 64, 3), {"residual_stride": 2}),
    "upsample": ((3, 64, (5, 4), 128, 3), {"upsample": 2, "out_size": [9, 8]}),
    "upsample-residual-2": (
        (3, 72, (5, 4), 128, 3),
        {"upsample": 2, "out_size": [10, 7], "residual_stride": 2},
    ),
    "upsample-1x1": ((3, 64, (4, 4), 64, 1), {"upsample": 2, "out_size": [8, 7]}),
    "1x1": ((3, 72, (9, 7), 256, 1), {}),
    "1x1-stride-2": ((5, 64, (9, 7), 128, 1), {"stride": 2}),
    "1x1-residual-2": ((5, 64, (9, 7), 128, 1), {"residual_stride": 2}),
}

# For the narrow tiles: boxes that hang over on every side, blocks that take many rows, that go from
# one strip of the images to the next, that take several strips of one row or two.
NARROW_PROBLEMS: dict[str, tuple[tuple, dict]] = {
    "one-pixel": ((1, 64, (1, 1), 64, 3), {}),
    "5x7": ((1, 64, (5, 7), 64, 3), {}),
    "7x5": ((3, 64, (7, 5), 64, 3), {}),
    "7x32": ((9, 64, (7, 32), 64, 3), {}),
    "32x5": ((3, 64, (32, 5), 64, 3), {}),
    "56x7": ((9, 64, (56, 7), 64, 3), {}),
    "5x56": ((1, 64, (5, 56), 64, 3), {}),
    "56x56": ((40, 64, (56, 56), 64, 3), {}),
    "32x32": ((164, 64, (32, 32), 64, 3), {}),
    "one-row": ((5596, 64, (1, 7), 64, 3), {}),
    "two-rows": ((2396, 64, (2, 17), 64, 3), {}),
    "40-channels": ((20, 40, (9, 30), 64, 3), {}),
    "8-channels": ((9, 8, (5, 15), 64, 3), {}),
    "unpadded": ((9, 64, (7, 19), 64, 3), {"padding": 0}),
    "padded-by-2": ((9, 64, (5, 13), 64, 3), {"padding": 2}),
    "cropped": ((9, 64, (9, 33), 64, 3), {"out_size": [7, 32]}),
}


def convolution(name: str, backward: bool) -> tuple[list[Tensor | None], dict]:
    """Return the op's tensors and options: the epilogue of a forward or of a backward pass."""
    (n, c, size, k, r), changes = (PROBLEMS | NARROW_PROBLEMS)[name]
    options = {
        "stride": 1,
        "padding": r // 2,
        "upsample": 1,
        "out_size": None,
        "residual_stride": 1,
        "relu": not backward,
        "save_positive": not backward,
    } | changes

    def normal(*shape: int) -> Tensor:
        tensor = torch.randn(*shape, device="cuda").to(HALF)
        return tensor.contiguous(memory_format=torch.channels_last)

    x, weight = normal(n, c, *size), normal(k, c, r, r) * (r * r * c) ** -0.5
    shape = output_shape(x, weight, *list(options.values())[:4])
    small = [-(-pixels // options["residual_stride"]) for pixels in shape[2:]]
    bias = None if backward else torch.randn(k, device="cuda")
    gate = pack_positive(normal(*shape)) if backward else None
    return [x, weight, bias, normal(n, k, *small), gate], options


def assert_right(
    out: Tensor, positive: Tensor, tensors: list[Tensor | None], options: dict, tile: object
) -> None:
    exact = [t.double() if t is not None and t.dtype == HALF else t for t in tensors]
    with forced("reference"):
        wanted = fused_conv2d(*exact, **options | {"save_positive": False})
    torch.testing.assert_close(
        out.double(),
        wanted,
        rtol=2.0**-8,
        atol=1e-4,
        equal_nan=True,
        msg=lambda text: f"{tile}: {text}",
    )
    if options["save_positive"]:
        assert torch.equal(positive, pack_positive(out)), tile


def launches(tensors: list[Tensor | None], options: dict) -> Callable[[Tile], bool]:
    """Return whether the kernel takes a tile: one without room in shared memory is refused."""

    def fits(tile: Tile) -> bool:
        try:
            run_cuda(*tensors, tile=tile, **options)
        except ValueError:
            return False
        return True

    return fits


@pytest.mark.gpu
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_tile_is_right(name, backward):
    tensors, options = convolution(name, backward)
    out, positive = run_cuda(*tensors, **options)  # the guess must fit
    assert_right(out, positive, tensors, options, "the guess")
    x, weight, _, residual, gate = tensors
    problem = problem_of(x, weight, out, residual, gate, **options)
    fitting = candidates(problem, launches(tensors, options))
    for tile in fitting:
        out, positive = run_cuda(*tensors, tile=tile, **options)
        assert_right(out, positive, tensors, options, tile)
    if PROBLEMS[name][0][-1] == 3 and options["stride"] == 1 and options["residual_stride"] == 1:
        assert {tile.halo for tile in fitting} == {False, True}
    assert fitting


@pytest.mark.gpu
@pytest.mark.parametrize("tile", NARROW, ids=lambda tile: str(tile.narrow_columns))
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no-residual"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", NARROW_PROBLEMS)
def test_narrow_tiles_are_right(name, backward, residual, tile):
    tensors, options = convolution(name, backward)
    if not residual:
        tensors[3] = None
    for _ in range(3):  # a race need not show at once
        out, positive = run_cuda(*tensors, tile=tile, **options)
        assert_right(out, positive, tensors, options, tile)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", NARROW, ids=lambda tile: str(tile.narrow_columns))
def test_narrow_tiles_without_an_epilogue(tile):
    tensors, options = convolution("56x7", backward=False)
    tensors[2] = tensors[3] = None
    options |= {"relu": False, "save_positive": False}
    assert_right(*run_cuda(*tensors, tile=tile, **options), tensors, options, tile)


@pytest.mark.gpu
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("tile", NARROW, ids=lambda tile: str(tile.narrow_columns))
def test_narrow_tiles_keep_nan_and_infinity(tile, backward):
    tensors, options = convolution("7x32", backward)
    tensors[0][1, 3, 2, 5] = torch.nan
    tensors[0][2, 4, 3, 17] = torch.inf
    tensors[0][8, 63, 6, 31] = -torch.inf
    tensors[3][4, 7, 0, 0] = torch.nan
    out, positive = run_cuda(*tensors, tile=tile, **options)
    assert out.isnan().any() and out.isinf().any()
    assert_right(out, positive, tensors, options, tile)


@pytest.mark.gpu
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", ["3x3", "upsample-residual-2", "1x1"])
def test_tuning_keeps_a_candidate_and_results_stay_right(name, backward):
    tensors, options = convolution(name, backward)
    with forced("cuda"):
        with tuning():
            first = fused_conv2d(*tensors, **options)
        ((key, tile),) = _conv_tiles._chosen.items()
        later = fused_conv2d(*tensors, **options)
    assert tile in candidates(key[1], launches(tensors, options))
    assert _conv_tiles._chosen == {key: tile}
    for result in (first, later):
        out, positive = (result, torch.empty(0)) if backward else result
        assert_right(out, positive, tensors, options, tile)


# What the networks ask for, forward and backward, and some shapes that none does.
TABLE = [
    Problem(n, c, k, r, size, size - odd, stride, r // 2, upsample, residual_stride, gated)
    for (n, c, k, r, size), odd, (stride, upsample, residual_stride), gated in itertools.product(
        [
            (128, 64, 64, 3, 56),
            (128, 64, 256, 1, 56),
            (512, 512, 512, 3, 4),
            (100, 2048, 512, 1, 7),
            (1, 8, 64, 3, 1),
            (7, 72, 192, 2, 9),
            (1, 8, 64, 1, 224),
        ],
        [0, 1],
        [(1, 1, 0), (1, 1, 1), (1, 1, 2), (2, 1, 0), (2, 1, 1), (3, 1, 0), (1, 2, 1), (1, 2, 2)],
        [False, True],
    )
    if size > odd
]


def test_a_guess_is_a_candidate_and_candidates_cover_their_pixels():
    for problem in TABLE:
        tiles = candidates(problem)
        assert guess(problem) in tiles, problem
        assert len(set(tiles)) == len(tiles), problem
        for tile in tiles:
            if tile in NARROW:
                assert (problem.k, problem.r, problem.stride, problem.upsample) == (64, 3, 1, 1)
                assert problem.c <= 64 and problem.residual_stride < 2, problem
            assert tile.pixels >= 1 << (tile.images_log2 + tile.columns_log2), (problem, tile)
            assert tile.channels <= max(64, problem.k), (problem, tile)
            if tile.halo:
                assert tile.images_log2 + tile.columns_log2 == 6, (problem, tile)
                assert problem.stride == 1 and problem.r > 1, (problem, tile)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("residual_stride", [0, 1])
@pytest.mark.parametrize(("n", "size", "columns"), [(512, 32, 16), (128, 32, 16), (128, 56, 14)])
def test_a_narrow_tile_is_the_guess_for_64_channels(n, size, columns, residual_stride, gated):
    problem = Problem(n, 64, 64, 3, size, size, 1, 1, 1, residual_stride, gated)
    assert guess(problem).narrow_columns == columns
    assert not guess(problem, lambda tile: tile not in NARROW).narrow_columns


@pytest.mark.parametrize("size", [7, 20])
def test_narrow_tiles_that_would_mostly_hang_over_are_not_tried(size):
    tiles = candidates(Problem(128, 64, 64, 3, size, size, 1, 1, 1, 0, False))
    assert tiles and not set(NARROW) & set(tiles)


@pytest.mark.skipif(
    not hasattr(_compiled._C, "fused_conv2d_fits"), reason="built without the CUDA kernels"
)
@pytest.mark.parametrize(
    ("changes", "fitting"),
    [
        ({}, True),
        ({"c": 8, "padding": 0}, True),
        ({"c": 128}, False),
        ({"k": 128}, False),
        ({"r": 1}, False),
        ({"stride": 2}, False),
        ({"upsample": 2}, False),
        ({"residual_stride": 2}, False),
        ({"gate": 1026}, False),
        ({"tile": (64, 1, 0, 1, 3, 0, 15)}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("tile", NARROW, ids=lambda tile: str(tile.narrow_columns))
def test_what_narrow_tiles_fit(tile, changes, fitting):
    asked = {"c": 64, "k": 64, "r": 3, "stride": 1, "padding": 1, "upsample": 1, "gate": 1024}
    asked |= {"residual_stride": 1, "tile": tile.arguments} | changes
    fits = _compiled._C.fused_conv2d_fits(
        *(1024, 1024, 0, 1024, asked["gate"], 0, 1024, 0),  # addresses that nobody reads
        [9, 9, 9, asked["c"], asked["k"], asked["r"], asked["r"], 9, 9],
        *(asked[name] for name in ("stride", "padding", "upsample", "residual_stride")),
        False,
        asked["tile"],
    )
    assert fits == fitting


def timed(monkeypatch: pytest.MonkeyPatch, milliseconds: Callable[[Tile], float]) -> None:
    def run_and_time(run: Callable[[Tile], object], tile: Tile, rounds: int) -> float:
        run(tile)
        return milliseconds(tile)

    monkeypatch.setattr(_conv_tiles, "_milliseconds", run_and_time)


def always(tile: Tile) -> bool:
    return True


def never(tile: Tile) -> None:
    pytest.fail("measured")


PROBLEM = Problem(128, 64, 256, 3, 56, 56, 1, 1, 1, 0, False)


def test_the_fastest_tile_that_fits_is_kept(monkeypatch):
    refused = set(candidates(PROBLEM)[:3])
    tiles = candidates(PROBLEM, lambda tile: tile not in refused)
    timed(monkeypatch, lambda tile: float(tiles.index(tile)))
    with tuning():
        assert pick(0, PROBLEM, lambda tile: None, lambda tile: tile not in refused) == tiles[0]
    assert pick(0, PROBLEM, never, always) == tiles[0]
    with tuning():
        assert pick(0, PROBLEM, never, always) == tiles[0]


def test_without_tuning_nothing_is_measured_and_tuning_replaces_the_guess(monkeypatch):
    slow = guess(PROBLEM)
    assert pick(0, PROBLEM, never, always) == slow
    timed(monkeypatch, lambda tile: 2.0 if tile == slow else 1.0)
    with tuning():
        assert pick(0, PROBLEM, lambda tile: None, always) in set(candidates(PROBLEM)) - {slow}
    assert pick(1, PROBLEM, never, always) == slow


def test_paddings_of_one_shape_are_timed_apart():
    weight, out = torch.ones(64, 8, 3, 3), torch.ones(2, 64, 8, 8)
    problems = [
        problem_of(
            torch.ones(2, 8, size, size), weight, out, None, None,
            stride=1, padding=padding, upsample=1, residual_stride=1,
        )
        for size, padding in ((8, 1), (10, 0))
    ]  # fmt: skip
    assert len(set(problems)) == 2


def test_tiles_that_waste_least_but_do_not_fit_hide_no_others():
    problem = Problem(5, 64, 128, 1, 5, 4, 2, 0, 1, 0, False)
    assert all(tile.resident for tile in candidates(problem))
    assert not guess(problem, lambda tile: not tile.resident).resident
