"""digits: 1,797 handwritten digits of 8x8 pixels, bundled with scikit-learn (always there)."""

from __future__ import annotations

import torch

from rtk.config import DataConfig
from rtk.data.dataset import DATA_SETS, Dataset, Split, every_fifth


@DATA_SETS.register("digits")
def digits(path: str, config: DataConfig) -> Dataset:
    """Return the digits, 0..16 scaled to 0..255 and repeated to 3 channels.

    The test split is the 5th, 10th, ... image of each class, whatever the library versions.
    Source: https://archive.ics.uci.edu/dataset/80 (test part), through sklearn.datasets.
    """
    from sklearn.datasets import load_digits  # costs about a second

    bunch = load_digits()
    grey = (torch.from_numpy(bunch.images) * (255 / 16)).round().to(torch.uint8)
    images = grey[:, None].expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(bunch.target).long()
    test = every_fifth(labels)
    return Dataset(
        name="digits",
        classes=tuple(str(digit) for digit in range(10)),
        train=Split(images[~test], labels[~test]),
        test=Split(images[test], labels[test]),
        val=None,
        augment="shift",
    )
