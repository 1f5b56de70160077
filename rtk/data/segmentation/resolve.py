"""From a setting to a segmentation set: its name and image size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import interpolate

from rtk.config import DataConfig
from rtk.data.keep import kept
from rtk.data.segmentation.dataset import (
    SEGMENTATION_SETS,
    SegmentationDataset,
    SegmentationSplit,
    check_memory,
)
from rtk.errors import RtkError, check_choice


@kept
def load(config: DataConfig) -> SegmentationDataset:
    """Return the segmentation set that `config` names, its images resized if that is set.

    Args:
        config: `name` is npz:PATH, voc2012, voc2012+sbd or digits. With `image_size` images are
            squeezed to (image_size, image_size), bilinearly, and masks by their nearest pixel.

    Raises:
        RtkError: where the name is unknown, the data are missing or damaged, or they are to be
            streamed or some of them skipped.
    """
    kind, colon, path = config.name.partition(":")
    try:
        check_choice("segmentation set", kind, SEGMENTATION_SETS.names())
    except RtkError as error:
        raise RtkError(f"{error} (your own images and masks: npz:PATH)") from None
    if bool(colon and path) != (kind == "npz"):
        raise RtkError(f"{config.name!r}: expected npz:PATH, or the name of a set without a path")
    if config.storage == "stream" or config.skip_bad:
        raise RtkError(
            "data.storage stream and data.skip_bad are for classification; segmentation sets are "
            "read whole, into memory: leave them out"
        )
    dataset = SEGMENTATION_SETS.get(kind)(path, config)
    if config.image_size is not None:
        size = config.image_size
        check_memory(config.name, sum(map(len, dataset.splits().values())), size, size)
        new: dict[str, Any] = {
            part: _resized(split, size) for part, split in dataset.splits().items()
        }
        dataset = replace(dataset, **new)
    return replace(dataset, name=config.name)


def _resized(split: SegmentationSplit, size: int) -> SegmentationSplit:
    images = torch.empty(len(split), 3, size, size, dtype=torch.uint8)
    masks = torch.empty(len(split), size, size, dtype=torch.uint8)
    for i, (image, mask) in enumerate(zip(split.images, split.masks, strict=True)):
        height, width = mask.shape if split.sizes is None else split.sizes[i].tolist()
        image, mask = image[None, :, :height, :width], mask[None, None, :height, :width]
        values = interpolate(image.float(), (size, size), mode="bilinear", antialias=True)
        images[i] = values[0].round_().clamp_(0, 255)
        masks[i] = interpolate(mask, (size, size), mode="nearest-exact")[0, 0]
    return SegmentationSplit(images, masks)
