"""Sets that stay in memory from one stage to the next."""

import pytest
import torch

from rtk import data
from rtk.config import DataConfig
from rtk.data import keep
from rtk.data.segmentation import load as load_masks


def test_inside_a_set_is_loaded_once():
    config = DataConfig("digits[0-1]")
    with data.keep_loaded():
        first = data.load(config)
        assert data.load(DataConfig("digits[0-1]")) is first
        assert data.load(DataConfig("digits[0-2]")) is not first
        assert data.load(DataConfig("digits[0-1]", image_size=4)).image_size == 4
    again = data.load(config)
    assert again is not first and torch.equal(again.train.images, first.train.images)


def test_labels_and_masks_of_one_name_are_two_sets():
    config = DataConfig("digits")
    with data.keep_loaded():
        labels, masks = data.load(config), load_masks(config)
        assert type(labels) is not type(masks)
        assert data.load(config) is labels and load_masks(config) is masks


def test_the_sets_used_last_are_kept(monkeypatch):
    one, two, three = (DataConfig(f"digits[{i}]") for i in range(3))
    size = keep._size(data.load(one))
    assert size == sum(s.images.numel() for s in data.load(one).splits().values())
    monkeypatch.setattr(keep, "MOST_BYTES", int(2.5 * size))
    with data.keep_loaded():
        first, second = data.load(one), data.load(two)
        assert data.load(one) is first
        data.load(three)  # the second goes, which was not used since
        assert data.load(one) is first
        assert data.load(two) is not second


def test_files_are_not_decoded_to_be_counted(tmp_path, monkeypatch):
    from PIL import Image

    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / part / name / "1.png")
    with data.keep_loaded():
        dataset = data.load(DataConfig(f"folder:{tmp_path}", image_size=8, storage="stream"))
        assert dataset.train.streamed and keep._size(dataset) == 0
        assert "images" not in vars(dataset.train)


def test_an_error_is_not_kept():
    from rtk.errors import RtkError

    with data.keep_loaded():
        for _ in range(2):
            with pytest.raises(RtkError, match="unknown class 99"):
                data.load(DataConfig("digits[99]"))
