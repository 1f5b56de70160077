"""What a data set is: splits of uint8 images and int64 labels, and where sets are looked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from rtk.config import DataConfig
from rtk.errors import RtkError, check_choice
from rtk.registry import Registry

METRICS = ("top1", "mean_per_class")
MAX_BYTES = 16 * 2**30  # images are held in memory; beyond this a machine is likely to swap


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels.

    Args:
        images: (N, 3, H, W) uint8, 0..255, N >= 1.
        labels: (N,) int64, >= 0.

    Raises:
        RtkError: where a shape or dtype is another.
    """

    images: Tensor
    labels: Tensor
    streamed: ClassVar[bool] = False  # whether images are read when they are needed

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise RtkError(
                f"images: expected uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}"
            )
        if labels.dtype != torch.int64 or labels.ndim != 1:
            raise RtkError(f"labels: expected int64 (N,), got {labels.dtype} {tuple(labels.shape)}")
        if len(images) != len(labels):
            raise RtkError(f"{len(images)} images but {len(labels)} labels: their lengths differ")
        if not len(images):
            raise RtkError("a split holds no image; expected at least one")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return self.images.shape[2], self.images.shape[3]

    def select(self, index: Tensor) -> Split:
        """Return the samples `index`, (N,) bool, or (M,) int64 in that order."""
        return Split(self.images[index], self.labels[index])

    def relabel(self, labels: Tensor) -> Split:
        """Return the same images with other labels, (N,) int64."""
        return Split(self.images, labels)

    def sample(self, count: int) -> Tensor:
        """Return `count` evenly spaced images, (M, 3, H, W) uint8; all where there are fewer."""
        if len(self) <= count:
            return self.images
        return self.images[[i * len(self) // count for i in range(count)]]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification task.

    Args:
        name: as given to `load`.
        classes: class names; label i is classes[i].
        train: the training images; every class occurs.
        test: the test images, of the same size.
        val: validation images of the same size, or None.
        augment: what the augmentation "auto" means for this set.
        metric: what is customarily reported of it: top1, or mean_per_class accuracy.

    Raises:
        RtkError: where image sizes differ, a label is not a class, or a class is never trained.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    val: Split | None
    augment: str
    metric: str = "top1"

    def __post_init__(self) -> None:
        check_choice(
            "augmentation", self.augment, ("none", "flip", "crop", "shift", "resized_crop")
        )
        check_choice("metric", self.metric, METRICS)
        size = self.train.size
        for part, split in self.splits().items():
            if split.size != size:
                raise RtkError(
                    f"{self.name}: train images are {size} and {part} images "
                    f"{split.size} pixels; resize them to one size"
                )
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0:
                raise RtkError(
                    f"{self.name}: {part} labels hold the negative value {low}; "
                    "number the classes from 0"
                )
            if high >= len(self.classes):
                raise RtkError(
                    f"{self.name}: {part} labels reach {high}, beyond the {len(self.classes)} "
                    f"classes (0..{len(self.classes) - 1}) of the training images"
                )
        counts = torch.bincount(self.train.labels, minlength=len(self.classes))
        missing = [i for i, count in enumerate(counts.tolist()) if count == 0]
        if missing:
            raise RtkError(
                f"{self.name}: classes are not contiguous: no training image has label "
                f"{', '.join(map(str, missing[:8]))}{', ...' if len(missing) > 8 else ''} of "
                f"0..{len(self.classes) - 1}; renumber the labels without gaps"
            )

    def splits(self) -> dict[str, Split]:
        """Return the splits that exist, by name."""
        named = {"train": self.train, "test": self.test, "val": self.val}
        return {name: split for name, split in named.items() if split is not None}

    def map_splits(self, function: Callable[[str, Split], Split], **changes: Any) -> Dataset:
        """Return a copy whose splits are `function(name, split)`; `changes` are other fields."""
        new = {name: function(name, split) for name, split in self.splits().items()}
        return replace(self, **{**changes, **new})

    @property
    def image_size(self) -> int:
        """Height of the images, in pixels (what a stem is chosen by)."""
        return self.train.size[0]


# A loader gets what stands after the colon of the name ("" without one) and the whole setting.
Loader = Callable[[str, DataConfig], Dataset]
DATA_SETS: Registry[Loader] = Registry("data set")


def data_root(config: DataConfig) -> Path:
    """Return the folder that holds the named sets: data.root, else RTK_DATA, else the cache."""
    return Path(config.root or os.environ.get("RTK_DATA") or "~/.cache/rtk/data").expanduser()


def candidate_paths(path: str, config: DataConfig) -> list[Path]:
    """Return where a user's `path` may be: as given, then under the data root."""
    given = Path(path).expanduser()
    return [given] if given.is_absolute() else [given, data_root(config) / given]


def check_memory(name: str, images: int, height: int, width: int) -> None:
    """Raise an RtkError where `images` RGB images of that size would not fit in memory."""
    size = 3 * images * height * width
    if size > MAX_BYTES:
        raise RtkError(
            f"{name}: {images} images of {height}x{width} pixels need about "
            f"{size / 2**30:.1f} GiB of memory, more than {MAX_BYTES / 2**30:g} GiB; "
            "set a smaller data.image_size, or data.storage stream for image files"
        )


def every_fifth(labels: Tensor) -> Tensor:
    """Return which samples test where a set has no test split: the 5th, 10th, ... of each class.

    It depends on nothing but the order of the samples: no seed, no library.

    Args:
        labels: (N,) int64, >= 0.

    Returns:
        (N,) bool, True for test.
    """
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        test[(labels == label).nonzero()[4::5, 0]] = True
    return test


def channel_stats(
    split: Split,
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return mean and standard deviation of each channel over all pixels, in [0, 1] scale.

    Computed from integer histograms, so the result does not depend on threads or device. A
    channel of one constant value gets 1/255 as its deviation, so that dividing by it is safe.
    Of images that stay in their files, 4,096 evenly spaced ones are read.
    """
    images = split.sample(4096) if split.streamed else split.images
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in range(3):
        counts = torch.zeros(256, dtype=torch.int64)
        for chunk in images[:, channel].split(4096):
            counts += torch.bincount(chunk.reshape(-1), minlength=256).cpu()
        share = counts.double() / counts.sum()
        centre = (share * levels).sum()
        mean.append(float(centre))
        std.append(max(float((share * (levels - centre) ** 2).sum().sqrt()), 1 / 255))
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])
