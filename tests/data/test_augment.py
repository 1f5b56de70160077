import math
import warnings

import pytest
import torch
from torch import Generator

from rtk.data.augment import (
    AUGMENTATIONS,
    crop_and_flip,
    draw_boxes,
    draw_flips,
    resize_boxes,
)
from rtk.errors import RtkError


def images(n=17, h=9, w=12):
    return torch.randint(0, 256, (n, 3, h, w), dtype=torch.uint8, generator=seeded(5))


def seeded(seed):
    return Generator().manual_seed(seed)


def by_loop(batch, tops, lefts, flips, border):
    """The plain definition: a black canvas, the image in its middle, a window of it, mirrored."""
    _, c, h, w = batch.shape
    results = []
    for image, top, left, mirrored in zip(batch, tops, lefts, flips, strict=True):
        canvas = torch.zeros(c, h + 2 * border, w + 2 * border, dtype=torch.uint8)
        canvas[:, border : border + h, border : border + w] = image
        window = canvas[:, top : top + h, left : left + w]
        results.append(window.flip(2) if mirrored else window)
    return torch.stack(results)


@pytest.mark.parametrize(("h", "w", "border"), [(8, 8, 1), (32, 32, 4), (9, 12, 1), (5, 3, 0)])
def test_crop_and_flip_equals_a_loop(h, w, border):
    batch = images(33, h, w)
    g = seeded(1)
    top, left = torch.randint(0, 2 * border + 1, (2, 33), generator=g)
    flips = draw_flips(33, g)
    assert torch.equal(
        crop_and_flip(batch, top, left, flips, border), by_loop(batch, top, left, flips, border)
    )


@pytest.mark.parametrize(
    ("name", "side", "border", "flip"),
    [("crop", 32, 4, True), ("shift", 32, 4, False), ("crop", 8, 1, True), ("shift", 5, 1, False)],
)
def test_crop_and_shift_equal_a_loop_over_what_was_drawn(name, side, border, flip):
    batch = images(50, side, side)
    result = AUGMENTATIONS.get(name)(batch, seeded(3))
    g = seeded(3)
    top, left = torch.randint(0, 2 * border + 1, (2, 50), generator=g)
    flips = draw_flips(50, g) if flip else torch.zeros(50)
    assert result.dtype == torch.uint8
    assert torch.equal(result, by_loop(batch, top, left, flips, border))
    assert set(top.tolist()) == set(range(2 * border + 1))  # both ends are reached


def test_flip_mirrors_about_half_and_nothing_else():
    batch = images(400)
    result = AUGMENTATIONS.get("flip")(batch, seeded(0))
    same = (result == batch).flatten(1).all(1)
    mirrored = (result == batch.flip(3)).flatten(1).all(1)
    assert torch.equal(same, ~mirrored)
    assert 160 < int(mirrored.sum()) < 240


def test_none_returns_the_images():
    batch = images()
    assert AUGMENTATIONS.get("none")(batch, seeded(0)) is batch


@pytest.mark.parametrize(("h", "w"), [(32, 32), (16, 48), (224, 160)])
def test_resize_boxes_equals_torchvision(h, w):
    from torchvision.transforms import functional as F

    batch = images(24, h, w)
    boxes = draw_boxes(24, h, w, seeded(2))
    boxes[0] = torch.tensor([0, 0, h, w])
    boxes[1] = torch.tensor([h - 1, w - 1, 1, 1])
    boxes[2] = torch.tensor([3, 2, 5, 1])
    flips = draw_flips(24, seeded(4))
    result = resize_boxes(batch, boxes, flips)
    for image, box, mirrored, got in zip(batch, boxes.int().tolist(), flips, result, strict=True):
        expected = F.resized_crop(image.float() / 255, *box, [h, w], antialias=True)
        expected = expected.flip(2) if mirrored else expected
        # Positions go through float32 in [-1, 1]: an error of some 1e-7 of the side in pixels.
        assert torch.allclose(got, expected, atol=1e-6 * max(h, w), rtol=0)
    assert torch.allclose(result[0], (batch[0].flip(2) if flips[0] else batch[0]) / 255, atol=4e-5)


def test_resized_crop_is_its_boxes_and_flips():
    batch = images()
    result = AUGMENTATIONS.get("resized_crop")(batch, seeded(8))
    g = seeded(8)
    boxes = draw_boxes(17, 9, 12, g)
    assert torch.equal(result, resize_boxes(batch, boxes, draw_flips(17, g)))
    assert result.dtype == torch.float32
    assert result.min() >= 0 and result.max() <= 1


@pytest.mark.parametrize(("h", "w"), [(32, 32), (7, 31), (100, 60)])
def test_boxes_are_distributed_as_torchvisions(h, w):
    from torchvision.transforms import RandomResizedCrop

    count = 4000
    ours = draw_boxes(count, h, w, seeded(0))
    top, left, height, width = ours.unbind(1)
    assert torch.equal(ours, ours.round())
    assert (top >= 0).all() and (top + height <= h).all() and (height >= 1).all()
    assert (left >= 0).all() and (left + width <= w).all() and (width >= 1).all()
    image = torch.empty(3, h, w)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torch.tensor(
            [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
        ).float()
    for a, b, side in zip(ours.unbind(1), theirs.unbind(1), (h, w, h, w), strict=True):
        error = 4 * math.sqrt(2 / count)  # four standard errors of a difference of means
        assert abs(a.mean() - b.mean()) <= error * max(float(b.std()), 0.01 * side)
        assert abs(a.std() - b.std()) <= 0.1 * max(float(b.std()), 0.1)


def test_boxes_fall_back_to_the_whole_height_of_a_strip():
    boxes = draw_boxes(300, 2, 90, seeded(0))
    assert [0, 43, 2, 3] in boxes.int().tolist()  # 2 x round(2 * 4/3), about the centre
    assert (boxes[:, 3] <= 3).all()


@pytest.mark.parametrize("name", ["flip", "crop", "shift", "resized_crop"])
def test_a_generator_decides_everything_and_the_global_state_is_left_alone(name):
    batch, before = images(), torch.get_rng_state()
    augment = AUGMENTATIONS.get(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(augment(batch, seeded(1)), augment(batch, seeded(1)))
    assert not torch.equal(augment(batch, seeded(1)), augment(batch, seeded(2)))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(batch, images())


def test_unknown_augmentation():
    with pytest.raises(RtkError, match=r"unknown augmentation 'crops'.*did you mean 'crop'"):
        AUGMENTATIONS.get("crops")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flip", "crop", "shift", "resized_crop"])
def test_gpu_equals_cpu(name):
    batch = images(40, 32, 32)
    augment = AUGMENTATIONS.get(name)
    on_cpu, on_gpu = augment(batch, seeded(1)), augment(batch.cuda(), seeded(1)).cpu()
    if name == "resized_crop":
        assert torch.allclose(on_cpu, on_gpu, atol=1e-5, rtol=0)
    else:
        assert torch.equal(on_cpu, on_gpu)
