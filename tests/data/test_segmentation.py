import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch.nn.functional import interpolate

from rtk import data as classification
from rtk.config import DataConfig
from rtk.data.segmentation import (
    IGNORED,
    SEGMENTATION_SETS,
    SegmentationBatches,
    SegmentationDataset,
    SegmentationSplit,
    WholeImages,
    load,
)
from rtk.data.segmentation.augment import Views, draw_views, look
from rtk.data.segmentation.dataset import pad_together
from rtk.errors import RtkError


def arrays(side=(6, 8), classes=3):
    rng = np.random.default_rng(0)
    found = {"class_names": np.array([f"class {i}" for i in range(classes)])}
    for part, count in (("train", 5), ("test", 3), ("val", 2)):
        found[f"{part}_images"] = rng.integers(0, 256, (count, *side, 3), dtype=np.uint8)
        masks = rng.integers(0, classes, (count, *side), dtype=np.uint8)
        masks[:, 0, 0], masks[:, 0, 1] = IGNORED, classes - 1
        found[f"{part}_masks"] = masks
    return found


def write(path, **values):
    np.savez(path, **values)
    return path


def read(path, **options):
    return load(DataConfig(f"npz:{path}", **options))


def refusal(name, **options):
    with pytest.raises(RtkError) as caught:
        load(DataConfig(str(name), **options))
    return str(caught.value)


def test_arrays_with_masks(tmp_path):
    values = arrays()
    dataset = read(write(tmp_path / "a.npz", **values))
    assert dataset.name == f"npz:{tmp_path / 'a.npz'}"
    assert dataset.classes == ("class 0", "class 1", "class 2")
    for part, split in dataset.splits().items():
        images = torch.from_numpy(values[f"{part}_images"]).permute(0, 3, 1, 2)
        assert torch.equal(split.images, images)
        assert torch.equal(split.masks, torch.from_numpy(values[f"{part}_masks"]))
        assert split.sizes is None
    assert set(dataset.splits()) == {"train", "test", "val"}


def test_masks_of_any_integers_val_and_names_left_out(tmp_path):
    values = arrays()
    for name in ("val_images", "val_masks", "class_names"):
        del values[name]
    values["train_masks"] = values["train_masks"].astype(np.int64)
    dataset = read(write(tmp_path / "a.npz", **values))
    assert dataset.val is None
    assert dataset.classes == ("0", "1", "2")
    assert dataset.train.masks.dtype == torch.uint8


def test_a_name_for_what_is_ignored_is_left_out_and_said(tmp_path):
    values = arrays() | {"class_names": np.array(["a", "b", "c", "void"])}
    with pytest.warns(UserWarning, match="no pixel is of void: left out"):
        assert read(write(tmp_path / "a.npz", **values)).classes == ("a", "b", "c")


def test_grey_images_are_repeated(tmp_path):
    values = arrays()
    for part in ("train", "test", "val"):
        values[f"{part}_images"] = values[f"{part}_images"][..., 0]
    with pytest.warns(UserWarning, match="grey images are repeated"):
        images = read(write(tmp_path / "a.npz", **values)).train.images
    assert torch.equal(images[:, 0], images[:, 2])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train_masks": None}, "no array train_masks; expected train_images, train_masks"),
        ({"val_masks": None}, "no array val_masks"),
        ({"train_masks": np.zeros((5, 6, 8))}, "float64 (5, 6, 8), expected integers (N, H, W)"),
        ({"train_masks": np.zeros((5, 6), np.uint8)}, "expected integers (N, H, W)"),
        ({"train_masks": np.zeros((4, 6, 8), np.uint8)}, "expected one class a pixel"),
        ({"train_masks": np.zeros((5, 8, 6), np.uint8)}, "expected one class a pixel"),
        ({"train_masks": np.full((5, 6, 8), -1)}, "values from -1 to -1"),
        ({"train_masks": np.full((5, 6, 8), 256)}, "values from 256 to 256"),
        ({"train_masks": np.full((5, 6, 8), 255)}, "train: every pixel of a split is 255"),
        ({"train_masks": np.full((5, 6, 8), 7)}, "train masks reach 7, beyond the 3 classes"),
        ({"class_names": np.zeros(3)}, "expected strings"),
        ({"train_images": np.zeros((5, 6, 8, 3))}, "expected uint8"),
    ],
    ids=str,
)
def test_wrong_arrays_are_refused(tmp_path, change, words):
    values = {n: v for n, v in (arrays() | change).items() if v is not None}
    message = refusal(f"npz:{write(tmp_path / 'a.npz', **values)}")
    assert words in message and "a.npz" in message


def test_digits_are_tiles_whose_ink_has_the_digits_class():
    scenes, digits = load(DataConfig("digits")), classification.load(DataConfig("digits"))
    assert scenes.classes == ("paper", *digits.classes)
    assert (len(scenes.train), len(scenes.test)) == (len(digits.train) // 4, len(digits.test) // 4)
    for scene, images in ((scenes.train, digits.train), (scenes.test, digits.test)):
        for place, (row, column) in enumerate([(0, 0), (0, 8), (8, 0), (8, 8)]):
            tile = scene.images[5, :, row : row + 8, column : column + 8]
            assert torch.equal(tile, images.images[20 + place])
            mask = scene.masks[5, row : row + 8, column : column + 8]
            expected = (tile[0] >= 64) * (images.labels[20 + place] + 1)
            assert torch.equal(mask.long(), expected.long()) and mask.any()


def test_names(tmp_path):
    assert SEGMENTATION_SETS.names() == ["npz", "digits", "voc2012", "voc2012+sbd"]
    assert "expected one of npz, digits, voc2012, voc2012+sbd; did you mean 'voc2012'" in refusal(
        "voc2021"
    )
    assert "expected npz:PATH" in refusal("npz:")
    assert "without a path" in refusal("voc2012:here")
    assert f"no file for npz:{tmp_path}/no.npz" in refusal(f"npz:{tmp_path}/no.npz")
    for options in ({"storage": "stream"}, {"skip_bad": True}):
        assert "segmentation sets are read whole" in refusal("voc2012", **options)


def test_image_size_squeezes_images_and_masks_alike(tmp_path):
    values = arrays(side=(8, 16), classes=2)
    values["train_masks"][:] = np.arange(16) // 8  # the left half is 0, the right 1
    values["train_images"][:] = 255 * values["train_masks"][..., None]
    split = read(write(tmp_path / "a.npz", **values), image_size=4).train
    assert split.images.shape == (5, 3, 4, 4)
    halves = torch.tensor([0, 0, 1, 1], dtype=torch.uint8)
    assert torch.equal(split.masks, halves.expand(5, 4, 4))
    assert (split.images[..., 0] == 0).all() and (split.images[..., 3] == 255).all()


def test_digits_are_four_side_by_side():
    dataset = load(DataConfig("digits"))
    assert dataset.classes == ("paper", *map(str, range(10)))
    single = classification.load(DataConfig("digits"))
    for split, digits in ((dataset.train, single.train), (dataset.test, single.test)):
        assert len(split) == len(digits) // 4
        for i, (top, left) in enumerate([(0, 0), (0, 8), (8, 0), (8, 8)]):
            image = split.images[5, :, top : top + 8, left : left + 8]
            mask = split.masks[5, top : top + 8, left : left + 8]
            assert torch.equal(image, digits.images[20 + i])
            assert set(mask.unique().tolist()) == {0, int(digits.labels[20 + i]) + 1}
            assert torch.equal(mask > 0, image[0] >= 64)


def voc(root):
    """A tree as the VOC and SBD archives unpack, with images of different sizes."""
    base = root / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (base / folder).mkdir(parents=True)
    for folder in ("img", "cls"):
        (root / "sbd" / folder).mkdir(parents=True)
    sizes = {"t1": (4, 6), "t2": (7, 5), "v1": (5, 5), "s1": (6, 8)}
    for value, (name, size) in enumerate(sizes.items(), start=1):
        image = Image.fromarray(np.full((*size, 3), 10 * value, np.uint8))
        mask = np.full(size, value, np.uint8)
        mask[0] = IGNORED
        image.save(base / "JPEGImages" / f"{name}.jpg")
        image.save(root / "sbd" / "img" / f"{name}.jpg")
        Image.fromarray(mask).save(base / "SegmentationClass" / f"{name}.png")
        cell = np.empty((1, 1), object)
        cell[0, 0] = np.full(size, 20, np.uint8)
        savemat(root / "sbd" / "cls" / f"{name}.mat", {"GTcls": {"Segmentation": cell[0, 0]}})
    lists = base / "ImageSets" / "Segmentation"
    (lists / "train.txt").write_text("t1\nt2\n")
    (lists / "val.txt").write_text("v1\n")
    (root / "sbd" / "train.txt").write_text("t1\ns1\n")
    (root / "sbd" / "val.txt").write_text("v1\n")


def test_voc(tmp_path):
    voc(tmp_path)
    dataset = load(DataConfig("voc2012", root=str(tmp_path)))
    assert len(dataset.classes) == 21 and dataset.classes[20] == "tvmonitor"
    train = dataset.train
    assert train.images.shape == (2, 3, 7, 6)
    assert train.sizes.tolist() == [[4, 6], [7, 5]]
    assert (train.masks[0, 1:4] == 1).all() and (train.masks[0, 4:] == IGNORED).all()
    assert (train.masks[1, 1:, :5] == 2).all() and (train.masks[1, :, 5] == IGNORED).all()
    assert (train.images[0, :, :4].float() - 10).abs().max() <= 2  # JPEG
    assert (train.images[0, :, 4:] == 0).all()
    assert len(dataset.test) == 1 and dataset.test.sizes is None and dataset.val is None


def test_voc_augmented_adds_what_sbd_alone_labels(tmp_path):
    voc(tmp_path)
    dataset = load(DataConfig("voc2012+sbd", root=str(tmp_path)))
    assert len(dataset.train) == 3  # t1 keeps VOC's own mask; v1, which tests, is left out
    assert dataset.train.masks[0, 1, 0] == 1
    assert (dataset.train.masks[2, :6, :8] == 20).all()
    resized = load(DataConfig("voc2012+sbd", root=str(tmp_path), image_size=4))
    assert resized.train.masks.shape == (3, 4, 4)
    assert (resized.train.masks[2] == 20).all()  # nothing of the padding


def test_voc_that_is_missing_or_damaged(tmp_path):
    message = refusal("voc2012", root=str(tmp_path))
    assert f"tried {tmp_path / 'VOCdevkit/VOC2012'}" in message and "rtk data get" in message
    voc(tmp_path)
    (tmp_path / "sbd").rename(tmp_path / "elsewhere")
    with pytest.raises(RtkError, match=r"no Semantic Boundaries Dataset .*sbd or .*dataset"):
        load(DataConfig("voc2012+sbd", root=str(tmp_path)))
    (tmp_path / "VOCdevkit/VOC2012/SegmentationClass/t2.png").unlink()
    assert "t2.jpg or its mask cannot be read" in refusal("voc2012", root=str(tmp_path))
    (tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt").unlink()
    assert "has no list of its train images" in refusal("voc2012", root=str(tmp_path))


def coded(count=7, height=16, width=20):
    """A split whose images show their masks: 8 classes in vertical stripes, image = 30 * class."""
    masks = torch.arange(width) // 3 % 8
    masks = masks.expand(count, height, width).clone()
    masks[:, height // 2 :] = 7 - masks[:, height // 2 :]
    masks = masks.to(torch.uint8)
    return SegmentationSplit((30 * masks)[:, None].expand(-1, 3, -1, -1).contiguous(), masks)


def test_augmentation_keeps_masks_on_their_images():
    """Each pixel's mask tells its place, and so does its colour; interpolated it is half off."""
    rows, columns = torch.arange(10)[:, None].expand(10, 20), torch.arange(20).expand(10, 20)
    image = torch.stack([12 * columns, 12 * rows, 0 * rows]).byte()
    split = SegmentationSplit(
        image.repeat(7, 1, 1, 1), (20 * rows + columns).byte().repeat(7, 1, 1)
    )
    batches = SegmentationBatches(
        split, 3, augment="scale_crop_flip", crop_size=9, epoch_steps=60, seed=3
    )
    beyond = mirrored = 0
    for x, y in batches.epoch(0):
        inside = y != IGNORED
        column, row = x[:, 0] * 255 / 12, x[:, 1] * 255 / 12
        assert ((column - y % 20).abs()[inside] <= 0.5 + 1e-3).all()
        assert ((row - y // 20).abs()[inside] <= 0.5 + 1e-3).all()
        assert (x[~inside[:, None].expand_as(x)] == 0).all()
        beyond += int((~inside).sum())
        mirrored += int(
            (column[:, 0, 4] > column[:, 0, 5])[inside[:, 0, 4] & inside[:, 0, 5]].sum()
        )
    assert beyond > 0 and 30 < mirrored < 150


def test_a_view_is_a_resized_image_and_its_window():
    split = coded(2)
    split = SegmentationSplit(torch.randint(0, 256, split.images.shape).byte(), split.masks)
    sizes = torch.tensor([[16, 20], [16, 20]])
    views = Views(
        torch.tensor([[32, 40], [24, 25]]),
        torch.tensor([[5, 7], [0, 11]]),
        torch.tensor([False, True]),
        (14, 14),
    )
    x, y = look(split.images, split.masks, sizes, views)
    for i, (scaled, (top, left)) in enumerate(
        zip(views.scaled.tolist(), views.corner.tolist(), strict=True)
    ):
        whole = interpolate(split.images[i : i + 1] / 255, scaled, mode="bilinear")
        labels = interpolate(split.masks[i : i + 1, None], scaled, mode="nearest-exact")
        window = whole[0, :, top : top + 14, left : left + 14]
        masks = labels[0, 0, top : top + 14, left : left + 14]
        if views.flips[i]:
            window, masks = window.flip(2), masks.flip(1)
        assert (x[i] - window).abs().max() < 1e-5
        assert torch.equal(y[i], masks.long())


def test_what_lies_beyond_the_scaled_image_is_black_and_ignored():
    split = coded(1)
    sizes = torch.tensor([[16, 20]])
    for flip in (False, True):
        views = Views(
            torch.tensor([[8, 10]]), torch.tensor([[0, 0]]), torch.tensor([flip]), (12, 16)
        )
        x, y = look(split.images, split.masks, sizes, views)
        if flip:
            x, y = x.flip(3), y.flip(2)
        assert (y[:, 8:] == IGNORED).all() and (y[:, :, 10:] == IGNORED).all()
        assert (y[:, :8, :10] != IGNORED).all()
        assert (x[:, :, 8:] == 0).all() and (x[:, :, :, 10:] == 0).all()


def test_nothing_of_the_padding_of_smaller_images_is_seen():
    image = torch.full((3, 5, 6), 200, dtype=torch.uint8)
    mask = torch.ones(5, 6, dtype=torch.uint8)
    split = pad_together("two", [(image, mask), (image.new_zeros(3, 9, 9), mask.new_zeros(9, 9))])
    batches = SegmentationBatches(
        split, 2, augment="scale_crop_flip", crop_size=8, epoch_steps=30, seed=1
    )
    for x, y in batches.epoch(0):
        ones = (y == 1)[:, None].expand_as(x)
        assert ones.any()
        assert (x[ones] - 200 / 255).abs().max() < 1e-5


def test_draws_follow_their_distributions():
    sizes = torch.tensor([[100, 160]]).expand(4000, 2)
    views = draw_views(sizes, 100, torch.Generator().manual_seed(0))
    scale = views.scaled[:, 0] / 100
    assert scale.min() >= 0.5 and scale.max() <= 2
    assert abs(scale.mean() - 1.25) < 0.02 and abs(views.flips.float().mean() - 0.5) < 0.03
    assert (views.scaled[:, 1] - 1.6 * views.scaled[:, 0]).abs().max() <= 1.4  # one scale for both
    room = (views.scaled - 100).clamp_min(0)
    assert (views.corner <= room).all() and (views.corner >= 0).all()
    share = (views.corner / room.clamp_min(1))[room[:, 0] > 20, 0]
    assert abs(share.mean() - 0.5) < 0.02 and share.max() > 0.95


def collect(batches, epochs, start=0):
    return [batch for epoch in epochs for batch in batches.epoch(epoch, start)]


def equal(ours, theirs):
    return len(ours) == len(theirs) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(ours, theirs, strict=True)
    )


def test_batches_are_a_function_of_seed_epoch_and_step():
    def make(seed=5, **options):
        return SegmentationBatches(
            coded(), 3, augment="scale_crop_flip", crop_size=12, seed=seed, **options
        )

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = collect(make(), [0])
    assert torch.equal(torch.get_rng_state(), state)
    assert len(first) == len(make()) == 2  # the seventh image is left out
    assert equal(first, collect(make(), [0]))
    assert equal(first[1:], collect(make(), [0], start=1))
    assert not equal(first, collect(make(), [1]))
    assert not equal(first, collect(make(seed=6), [0]))


def test_an_epoch_of_so_many_steps_goes_on_in_the_images():
    def make(**options):
        return SegmentationBatches(coded(), 3, augment="flip", **options)

    whole = collect(make(), range(5))  # ten steps
    batches = make(epoch_steps=5)
    assert len(batches) == 5
    assert equal(collect(batches, range(2)), whole)
    assert equal(collect(batches, [1], start=3), whole[8:])


def test_whole_images_are_the_images():
    split = coded()
    (x, y), *_ = SegmentationBatches(split, 7).epoch(0)
    assert x.shape == (7, 3, 16, 20)
    assert (x[0] - split.images[0] / 255).abs().max() < 1e-5  # all seven are alike
    assert torch.equal(y, split.masks.long())
    assert x.is_contiguous()
    (x, _), *_ = SegmentationBatches(split, 7, channels_last=True).epoch(0)
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_flips_are_of_image_and_mask():
    split = coded(40)
    ((x, y),) = SegmentationBatches(split, 40, augment="flip").epoch(0)
    mirrored = [torch.equal(mask, split.masks[0].long().flip(1)) for mask in y]
    assert 8 < sum(mirrored) < 32
    for image, mask in zip(x, y, strict=True):
        assert (image[0] * 255 / 30 - mask).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"augment": "crop"}, "unknown segmentation augmentation 'crop'"),
        ({"augment": "scale_crop_flip"}, "needs crop_size"),
        ({"augment": "scale_crop_flip", "crop_size": 0}, "crop_size: expected at least 1"),
        ({"epoch_steps": 0}, "epoch_steps: expected at least 1"),
    ],
)
def test_bad_settings_of_batches(options, words):
    with pytest.raises(RtkError, match=words):
        SegmentationBatches(coded(), **{"batch_size": 2, **options})


def test_a_start_beyond_the_epoch_is_refused():
    with pytest.raises(RtkError, match="start 3"):
        SegmentationBatches(coded(), 3).epoch(0, 3)
    with pytest.raises(RtkError, match="at least 1 image"):
        WholeImages(coded(), 0)


def test_evaluation_sees_each_image_once_and_unpadded(monkeypatch):
    pairs = []
    for value, size in enumerate([(5, 6), (9, 4), (5, 6), (5, 6)]):
        image = torch.full((3, *size), value, dtype=torch.uint8)
        pairs.append((image, torch.full(size, value, dtype=torch.uint8)))
    split = pad_together("four", pairs)
    seen = [(tuple(y.shape), y.unique().tolist()) for _, y in WholeImages(split, 2)]
    assert seen == [((2, 5, 6), [0, 2]), ((1, 5, 6), [3]), ((1, 9, 4), [1])]
    for x, y in WholeImages(split, 2):
        assert ((x * 255).round() == y[:, None]).all()
    monkeypatch.setattr("rtk.data.segmentation.batches._MOST_PIXELS", 40)
    assert [len(y) for _, y in WholeImages(split, 2)] == [1, 1, 1, 1]


def test_splits_check_themselves():
    images, masks = torch.zeros(2, 3, 4, 4).byte(), torch.zeros(2, 4, 4).byte()
    wrong = [
        (images.float(), masks, "images: expected uint8"),
        (images, masks.long(), "masks: expected uint8"),
        (images, masks[:1], "expected one class a pixel"),
        (images[:0], masks[:0], "holds no image"),
    ]
    for x, y, words in wrong:
        with pytest.raises(RtkError, match=words):
            SegmentationSplit(x, y)
    with pytest.raises(RtkError, match="sizes: expected"):
        SegmentationSplit(images, masks, torch.zeros(2))
    split = SegmentationSplit(images, masks + 2)
    with pytest.raises(RtkError, match=r"train masks reach 2, beyond the 2 classes \(0..1\)"):
        SegmentationDataset("a", ("x", "y"), split, split, None)


def test_too_much_for_memory_is_refused(monkeypatch):
    monkeypatch.setattr("rtk.data.segmentation.dataset.MAX_BYTES", 100)
    pair = (torch.zeros(3, 8, 8).byte(), torch.zeros(8, 8).byte())
    with pytest.raises(RtkError, match=r"1 images and masks of 8x8 pixels"):
        pad_together("big", [pair])


@pytest.fixture(autouse=True)
def _no_other_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield
