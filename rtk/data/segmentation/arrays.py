"""npz:PATH: anybody's arrays, {train,test,val}_images as for classification, and _masks."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch

from rtk.config import DataConfig
from rtk.data.arrays import read_arrays, to_images
from rtk.data.dataset import candidate_paths
from rtk.data.segmentation.dataset import (
    IGNORED,
    SEGMENTATION_SETS,
    SegmentationDataset,
    SegmentationSplit,
)
from rtk.errors import RtkError


def _masks(path: Path, name: str, array: np.ndarray) -> torch.Tensor:
    """(N, H, W) of any integer type, values 0..255 -> uint8."""
    if array.dtype.kind not in "iu" or array.ndim != 3:
        raise RtkError(
            f"{path}: {name} are {array.dtype} {array.shape}, expected integers (N, H, W): the "
            f"class of each pixel, {IGNORED} where it is ignored"
        )
    if array.size and not 0 <= int(array.min()) <= int(array.max()) <= IGNORED:
        raise RtkError(
            f"{path}: {name} hold values from {array.min()} to {array.max()}; number the classes "
            f"from 0 and mark pixels to ignore with {IGNORED}"
        )
    return torch.from_numpy(array.astype(np.uint8))


@SEGMENTATION_SETS.register("npz")
def npz(path: str, config: DataConfig) -> SegmentationDataset:
    """Return the set in the file `path`: {train,test,val}_images and _masks, class_names.

    Images are uint8 (N, H, W), (N, H, W, 1) or (N, H, W, 3), masks integers (N, H, W), 255 where a
    pixel is ignored; val and class_names may be absent. Names at the end whose class no pixel of
    any split has (a "void" that the masks call 255) are left out. A relative path is tried as given
    and under the data root. Raises RtkError where the file is missing, damaged, pickled or of
    another layout.
    """
    tried = candidate_paths(path, config)
    found = next((candidate for candidate in tried if candidate.is_file()), None)
    if found is None:
        raise RtkError(
            f"no file for npz:{path}; tried {' and '.join(map(str, tried))}; "
            "give the path of an .npz file, absolute or below the data root"
        )
    arrays = read_arrays(found, "masks")
    if arrays["train_images"].ndim == 3 or arrays["train_images"].shape[-1] == 1:
        warnings.warn(f"{found}: grey images are repeated to 3 channels", stacklevel=2)
    splits: dict[str, SegmentationSplit] = {}
    for part in ("train", "test", "val"):
        if f"{part}_images" not in arrays:
            continue
        images = to_images(found, f"{part}_images", arrays.pop(f"{part}_images"))
        masks = _masks(found, f"{part}_masks", arrays.pop(f"{part}_masks"))
        try:
            splits[part] = SegmentationSplit(images, masks)
        except RtkError as error:
            raise RtkError(f"{found}: {part}: {error}") from None
    count = 1 + max(split.highest_class for split in splits.values())
    classes = tuple(str(i) for i in range(count))
    if "class_names" in arrays:
        names = arrays["class_names"]
        if names.ndim != 1 or names.dtype.kind not in "US":
            raise RtkError(
                f"{found}: class_names are {names.dtype} {names.shape}, expected strings (C,)"
            )
        every = tuple(str(name) for name in names.astype(np.str_))
        classes = every[:count]
        if len(every) > count:
            warnings.warn(
                f"{found}: no pixel is of {', '.join(every[count:])}: left out", stacklevel=2
            )
    val = splits.get("val")
    return SegmentationDataset(f"npz:{found}", classes, splits["train"], splits["test"], val)
