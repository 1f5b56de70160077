"""Names of granularities, their order, and what masks are told to be."""

import random

import pytest
import torch

from rtk.errors import RtkError
from rtk.granularity import Granularity, recognise, sort_key

SHAPES = ((96, 32, 3, 3), (32, 96, 1, 1))


def tiled(shape, k, c):
    """Return a random mask of k x c tiles, ragged at the end."""
    groups = torch.rand(-(-shape[0] // k), -(-shape[1] // c), *shape[2:]) < 0.5
    return groups.repeat_interleave(k, 0).repeat_interleave(c, 1)[: shape[0], : shape[1]]


def n_of_m(shape, n, m):
    return (torch.rand(shape).unflatten(1, (-1, m)).argsort(2).argsort(2) < n).flatten(1, 2)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("name", "canonical", "tile", "pattern"),
    [
        ("element", "element", None, None),
        ("channel", "channel", None, None),
        ("block", "block-64", (64, 64), None),
        ("block-64", "block-64", (64, 64), None),
        ("block-64x64", "block-64", (64, 64), None),
        ("block-16x32", "block-16x32", (16, 32), None),
        ("block-1x32", "block-1x32", (1, 32), None),
        ("block-08", "block-8", (8, 8), None),
        ("2:4", "2:4", None, (2, 4)),
        ("1:16", "1:16", None, (1, 16)),
    ],
)
def test_names(name, canonical, tile, pattern):
    granularity = Granularity.parse(name)
    assert granularity.name == canonical
    assert (granularity.tile, granularity.n_of_m) == (tile, pattern)
    assert Granularity.parse(canonical) == granularity


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rows", "unknown granularity 'rows': expected one of element, row, .*mean 'row'"),
        ("blok-64", "unknown granularity 'blok-64'.*block-KxC.*N:M.*did you mean 'block-64'"),
        ("block64", "did you mean 'block-64'"),
        ("block-64x", "did you mean 'block-64'"),
        ("block-16x-2", "unknown granularity 'block-16x-2'"),
        ("2-4", "unknown granularity '2-4'.*did you mean '2:4'"),
        ("", "unknown granularity ''"),
        (124, "unknown granularity 124"),
        ("block-0", "'block-0': expected a tile of at least 1 x 1 channels, e.g. block-64"),
        ("block-8x0", "'block-8x0': expected a tile of at least 1 x 1"),
        ("4:2", "'4:2': expected N:M with 0 < N < M, e.g. 2:4"),
        ("4:4", "'4:4': expected N:M"),
        ("0:4", "'0:4': expected N:M"),
    ],
)
def test_bad_names_are_refused(name, message):
    with pytest.raises(RtkError, match=message):
        Granularity.parse(name)


def test_reports_show_the_fine_before_the_coarse():
    names = [None, "element", "row", "kernel", "channel"]
    names += ["block-8", "block-4x32", "block-16x32", "block-32x16", "block-64", "block-128"]
    names += ["1:2", "1:4", "2:4", "4:8", "something else"]
    shuffled = random.Random(0).sample(names, len(names))
    assert sorted(shuffled, key=sort_key) == names


@pytest.mark.parametrize(
    ("name", "masks"),
    [
        ("block-16", lambda shape: tiled(shape, 16, 16)),
        ("block-8x32", lambda shape: tiled(shape, 8, 32)),
        ("block-1x32", lambda shape: tiled(shape, 1, 32)),
        ("block-5x7", lambda shape: tiled(shape, 5, 7)),
        ("2:4", lambda shape: n_of_m(shape, 2, 4)),
        ("1:4", lambda shape: n_of_m(shape, 1, 4)),
        ("1:2", lambda shape: n_of_m(shape, 1, 2)),
        ("4:16", lambda shape: n_of_m(shape, 4, 16)),
        ("element", lambda shape: torch.rand(shape) < 0.1),
        ("element", lambda shape: torch.rand(shape) < 0.999),
        ("element", lambda shape: torch.ones(shape) > 0),
        ("element", lambda shape: torch.zeros(shape) > 0),
        ("element", lambda shape: (torch.rand(shape[0], 1, 1, 1) < 0.5).expand(shape)),
        ("element", lambda shape: (torch.rand(1, shape[1], 1, 1) < 0.5).expand(shape)),
        ("channel", lambda shape: torch.rand(shape[0], 1, 1, 1) < 0.5),
        ("kernel", lambda shape: torch.rand(*shape[:2], 1, 1) < 0.5),
        ("row", lambda shape: torch.rand(*shape[:3], 1) < 0.5),
    ],
)
def test_what_is_recognised_is_there_and_is_the_coarsest(name, masks):
    masks = [masks(shape) for shape in SHAPES]
    granularity = recognise(masks, SHAPES)
    assert granularity.name == name
    assert all(granularity.holds(m, s) for m, s in zip(masks, SHAPES, strict=True))


def test_whole_taps_of_small_layers_are_blocks():
    masks = [torch.rand(1, 1, *shape[2:]).expand(shape) < 0.5 for shape in SHAPES]
    assert masks[0].any() and not masks[0].all()
    assert recognise(masks, SHAPES).name == "block-64"


def test_a_layer_left_dense_is_no_sign_against_n_of_m():
    shapes = [*SHAPES, (8, 3, 3, 3)]
    masks = [n_of_m(SHAPES[0], 2, 4), n_of_m(SHAPES[1], 2, 4), torch.ones(8, 3, 3, 3) > 0]
    assert recognise(masks, shapes).name == "2:4"
    assert Granularity.parse("2:4").holds(masks[2], shapes[2])
    masks[2][0, 0, 0, 0] = False
    assert recognise(masks, shapes).name == "element"
    assert not Granularity.parse("2:4").holds(masks[2], shapes[2])


def test_fewer_than_n_of_m_hold_and_more_do_not():
    mask = n_of_m(SHAPES[0], 2, 4)
    granularity = Granularity.parse("2:4")
    assert granularity.holds(mask & (torch.rand(mask.shape) < 0.9), SHAPES[0])
    flat = mask.view(-1)
    flat[(~flat).nonzero()[7]] = True
    assert not granularity.holds(mask, SHAPES[0])


@pytest.mark.parametrize("name", ["row", "kernel", "channel", "block-16", "block-8x32", "2:4"])
def test_one_weight_that_is_out_of_line_is_seen(name):
    shape = SHAPES[0]
    granularity = Granularity.parse(name)
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[16:32, :32, 1] = True
    if name in ("kernel", "channel"):
        mask[16:32] = True
    if name == "2:4":
        mask[:, 2::4] = mask[:, 3::4] = False
    assert granularity.holds(mask, shape)
    for index in ((0, 0, 0, 0), (40, 31, 2, 2), (95, 17, 0, 1)):
        changed = mask.clone()
        changed[index] = True
        # 1 of 4 is within 2 of 4: two more in the group are needed.
        if name == "2:4":
            changed[index[0], index[1] // 4 * 4 : index[1] // 4 * 4 + 4, index[2], index[3]] = True
        assert not granularity.holds(changed, shape), index


def test_coarser_tiles_hold_finer_ones_and_not_the_other_way():
    mask = tiled((64, 64, 3, 3), 16, 16)
    for name, holds in [("block-8", True), ("block-16x4", True), ("block-32", False)]:
        assert Granularity.parse(name).holds(mask, mask.shape) == holds
