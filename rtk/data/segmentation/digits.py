"""digits: four of scikit-learn's digits side by side, each pixel of ink of its digit's class."""

from __future__ import annotations

import torch
from torch import Tensor

from rtk.config import DataConfig
from rtk.data.dataset import Split
from rtk.data.digits import digits as load_digits
from rtk.data.segmentation.dataset import (
    SEGMENTATION_SETS,
    SegmentationDataset,
    SegmentationSplit,
)

_INK = 64  # of 255: what is brighter than a quarter is the digit


@SEGMENTATION_SETS.register("digits")
def digits(path: str, config: DataConfig) -> SegmentationDataset:
    """Return 16x16 images of 2x2 digits, for a first look: always there, nothing to download.

    Class 0 is the paper, 1 to 10 are the digits 0 to 9. Images are made of four digits that follow
    each other in the set, and those of the test split of digits that only test.
    """
    whole = load_digits(path, config)
    assert isinstance(whole.train, Split) and isinstance(whole.test, Split)
    classes = ("paper", *whole.classes)
    return SegmentationDataset("digits", classes, _scenes(whole.train), _scenes(whole.test), None)


def _scenes(split: Split) -> SegmentationSplit:
    count = len(split.images) // 4
    ink = split.images[:, 0] >= _INK
    masks = torch.where(ink, split.labels[:, None, None] + 1, 0).to(torch.uint8)
    return SegmentationSplit(
        _tiled(split.images[: 4 * count]), _tiled(masks[: 4 * count, None])[:, 0]
    )


def _tiled(images: Tensor) -> Tensor:
    """(4 N, C, H, W) -> (N, C, 2 H, 2 W)."""
    _, channels, height, width = images.shape
    tiles = images.view(-1, 2, 2, channels, height, width).permute(0, 3, 1, 4, 2, 5)
    return tiles.reshape(-1, channels, 2 * height, 2 * width)
