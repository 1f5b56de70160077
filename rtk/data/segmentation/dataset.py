"""What a segmentation set is: splits of uint8 images and a mask of classes for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rtk.config import DataConfig
from rtk.data.dataset import MAX_BYTES
from rtk.errors import RtkError
from rtk.registry import Registry

IGNORED = 255  # of a mask: a pixel that neither trains nor counts


@dataclass(frozen=True, eq=False)
class SegmentationSplit:
    """Images and their masks.

    Args:
        images: (N, 3, H, W) uint8, 0..255, N >= 1.
        masks: (N, H, W) uint8: the class of each pixel, 255 where it is ignored.
        sizes: (N, 2) int64, height and width of each image, where they differ: it lies in the
            upper left corner, and the rest of its mask is 255. None: all are (H, W).

    Raises:
        RtkError: where a shape or dtype is another, or all pixels are ignored.
    """

    images: Tensor
    masks: Tensor
    sizes: Tensor | None = None

    def __post_init__(self) -> None:
        images, masks = self.images, self.masks
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise RtkError(
                f"images: expected uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}"
            )
        if masks.dtype != torch.uint8 or masks.ndim != 3:
            raise RtkError(f"masks: expected uint8 (N, H, W), got {masks.dtype} {(*masks.shape,)}")
        if (len(images), *images.shape[2:]) != tuple(masks.shape):
            raise RtkError(
                f"images are {tuple(images.shape)} but masks {tuple(masks.shape)}: expected one "
                "class a pixel, (N, H, W)"
            )
        if not len(images):
            raise RtkError("a split holds no image; expected at least one")
        if self.sizes is not None and self.sizes.shape != (len(images), 2):
            raise RtkError(f"sizes: expected (N, 2), got {tuple(self.sizes.shape)}")
        if not (masks != IGNORED).any():
            raise RtkError(f"every pixel of a split is {IGNORED}, which is ignored; label some")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def highest_class(self) -> int:
        """The highest class that a pixel has."""
        return max(int(part[part != IGNORED].max(initial=0)) for part in self.masks.numpy())


@dataclass(frozen=True, eq=False)
class SegmentationDataset:
    """A segmentation task.

    Args:
        name: as given to `load`.
        classes: class names; a pixel of value i is of classes[i].
        train: the training images.
        test: the test images.
        val: validation images, or None.

    Raises:
        RtkError: where a pixel is neither of a class nor ignored.
    """

    name: str
    classes: tuple[str, ...]
    train: SegmentationSplit
    test: SegmentationSplit
    val: SegmentationSplit | None

    def __post_init__(self) -> None:
        for part, split in self.splits().items():
            if split.highest_class >= len(self.classes):
                raise RtkError(
                    f"{self.name}: {part} masks reach {split.highest_class}, beyond the "
                    f"{len(self.classes)} classes (0..{len(self.classes) - 1}); pixels to ignore "
                    f"are {IGNORED}"
                )

    def splits(self) -> dict[str, SegmentationSplit]:
        """Return the splits that exist, by name."""
        named = {"train": self.train, "test": self.test, "val": self.val}
        return {name: split for name, split in named.items() if split is not None}


# A loader gets what stands after the colon of the name ("" without one) and the whole setting.
Loader = Callable[[str, DataConfig], SegmentationDataset]
SEGMENTATION_SETS: Registry[Loader] = Registry("segmentation set")


def pad_together(name: str, pairs: list[tuple[Tensor, Tensor]]) -> SegmentationSplit:
    """Return a split of images (3, h, w) and masks (h, w) whose sizes may differ.

    Raises RtkError where they would need more than 16 GiB together.
    """
    sizes = torch.tensor([mask.shape for _, mask in pairs])
    height, width = sizes.amax(0).tolist()
    check_memory(name, len(pairs), height, width)
    images = torch.zeros(len(pairs), 3, height, width, dtype=torch.uint8)
    masks = torch.full((len(pairs), height, width), IGNORED, dtype=torch.uint8)
    for i, (image, mask) in enumerate(pairs):
        h, w = mask.shape
        images[i, :, :h, :w] = image
        masks[i, :h, :w] = mask
    alike = bool((sizes == sizes[0]).all())
    return SegmentationSplit(images, masks, None if alike else sizes)


def check_memory(name: str, images: int, height: int, width: int) -> None:
    """Raise an RtkError where so many images and masks of that size would not fit in memory."""
    size = 4 * images * height * width
    if size > MAX_BYTES:
        raise RtkError(
            f"{name}: {images} images and masks of {height}x{width} pixels need about "
            f"{size / 2**30:.1f} GiB of memory, more than {MAX_BYTES / 2**30:g} GiB; "
            "set a smaller data.image_size"
        )
