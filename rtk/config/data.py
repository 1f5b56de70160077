"""Which images a stage reads."""

from __future__ import annotations

from dataclasses import dataclass

from rtk.config.checks import require
from rtk.errors import check_choice


@dataclass(frozen=True)
class DataConfig:
    """Which images a stage reads.

    Args:
        name: digits, cifar10, food, ... (`rtk data list` shows all), npz:PATH or folder:PATH; a
            class subset in brackets, e.g. digits[0-4] or cifar10[0,2,5-7].
        root: folder that holds the named sets (else RTK_DATA, else ~/.cache/rtk/data).
        image_size: height and width in pixels that images are resized to; null keeps the set's.
        augment: none, flip, crop (pad by an eighth, random crop, flip), shift (the crop without
            the flip, for digits and signs), resized_crop (RandomResizedCrop and flip), or auto:
            what suits the set.
        storage: of image files: memory (decoded once), stream (decoded for each batch, crops taken
            from whole images) or auto: named sets stream above 64 pixels, the rest is in memory.
        skip_bad: leave out images that cannot be decoded and say so, instead of stopping; each
            image is decoded once beforehand.
        workers: processes that decode streamed images; null is one a CPU, at most 16, 0 is none.
        download: fetch a named set that is missing, where that is possible.
    """

    name: str = "digits"
    root: str | None = None
    image_size: int | None = None
    augment: str = "auto"
    storage: str = "auto"
    skip_bad: bool = False
    workers: int | None = None
    download: bool = False

    def __post_init__(self) -> None:
        check_choice("storage", self.storage, ("auto", "memory", "stream"))
        require(
            self.workers is None or self.workers >= 0,
            "data.workers",
            "a number of processes >= 0",
            self.workers,
        )
        require(
            self.image_size is None or self.image_size > 0,
            "data.image_size",
            "a positive number of pixels",
            self.image_size,
        )
        check_choice(
            "augmentation", self.augment, ("auto", "none", "flip", "crop", "shift", "resized_crop")
        )


def unnamed() -> DataConfig:
    """Return the images of a stage whose other settings say which ones where no name does."""
    return DataConfig(name="")
