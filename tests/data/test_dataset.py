import pytest
import torch

from rtk.data import Dataset, Split, channel_stats
from rtk.data.dataset import check_memory, every_fifth
from rtk.errors import RtkError


def split(labels, size=4, images=None):
    labels = torch.tensor(labels)
    if images is None:
        images = torch.zeros(len(labels), 3, size, size, dtype=torch.uint8)
    return Split(images, labels)


def dataset(train=(0, 1), test=(0,), val=None, classes=("a", "b"), test_size=4, **more):
    val = None if val is None else split(val)
    options = {"augment": "crop", **more}
    return Dataset("toy", classes, split(train), split(test, test_size), val, **options)


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (torch.zeros(1, 3, 4, 4), torch.zeros(1).long(), "expected uint8 (N, 3, H, W), got"),
        (torch.zeros(1, 1, 4, 4).byte(), torch.zeros(1).long(), "(1, 1, 4, 4)"),
        (torch.zeros(1, 3, 4, 4).byte(), torch.zeros(1), "expected int64 (N,), got torch.float32"),
        (torch.zeros(1, 3, 4, 4).byte(), torch.zeros(1, 1).long(), "(1, 1)"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(1).long(), "2 images but 1 labels"),
        (torch.zeros(0, 3, 4, 4).byte(), torch.zeros(0).long(), "no image"),
    ],
    ids=["float-images", "one-channel", "float-labels", "2d-labels", "lengths", "empty"],
)
def test_split_refuses(images, labels, words):
    with pytest.raises(RtkError) as error:
        Split(images, labels)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"test_size": 5}, "train images are (4, 4) and test images (5, 5)"),
        ({"test": (0, 2)}, "test labels reach 2, beyond the 2 classes"),
        ({"train": (0, -1)}, "train labels hold the negative value -1"),
        ({"val": (0, 7)}, "val labels reach 7"),
        ({"classes": ("a", "b", "c")}, "no training image has label 2 of 0..2"),
        ({"augment": "auto"}, "unknown augmentation 'auto'"),
        ({"metric": "top5"}, "unknown metric 'top5'"),
    ],
    ids=["sizes", "beyond", "negative", "val", "gap", "augment", "metric"],
)
def test_dataset_refuses(arguments, words):
    with pytest.raises(RtkError) as error:
        dataset(**arguments)
    assert words in str(error.value)


def test_splits_and_image_size():
    assert list(dataset().splits()) == ["train", "test"]
    assert list(dataset(val=(1,)).splits()) == ["train", "test", "val"]
    assert dataset().image_size == 4
    assert len(dataset().train) == 2


def test_every_fifth_takes_the_fifth_of_each_class():
    labels = torch.tensor([0, 1] * 7 + [2])
    test = every_fifth(labels)
    assert test.nonzero()[:, 0].tolist() == [8, 9]  # 0: samples 0, 2, ..., 8; 1: 1, 3, ..., 9


def test_channel_stats_equal_float64_moments():
    images = torch.randint(0, 256, (9, 3, 5, 7), dtype=torch.uint8)
    images[:, 2] = 40
    mean, std = channel_stats(split([0] * 9, images=images))
    values = images.double() / 255
    expected = values.std((0, 2, 3), correction=0)
    assert mean == pytest.approx(values.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert std[:2] == pytest.approx(expected[:2].tolist(), abs=1e-12)
    assert std[2] == 1 / 255  # a constant channel must not be divided by zero


def test_check_memory_says_the_estimate_and_the_remedy():
    check_memory("toy", 1000, 224, 224)
    with pytest.raises(RtkError, match=r"toy: 1281167 .* 179\.6 GiB .*smaller data\.image_size"):
        check_memory("toy", 1_281_167, 224, 224)
