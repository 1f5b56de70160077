"""From a setting to a data set: name, class subset, image size."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.functional import interpolate

from rtk import distributed
from rtk.config import DataConfig
from rtk.data.catalogue import CATALOGUE
from rtk.data.dataset import DATA_SETS, Dataset, Split, candidate_paths, check_memory
from rtk.data.download import get
from rtk.data.keep import kept
from rtk.data.subset import parse_classes, split_name, take_classes
from rtk.errors import RtkError, check_choice

_TAKE_A_PATH = ("npz", "folder")


@kept
def load(config: DataConfig) -> Dataset:
    """Return the data set that `config` names, its classes chosen and its images resized.

    Args:
        config: `name` is one of DATA_SETS, npz:PATH or folder:PATH, with a class subset in brackets
            if wanted; a path that ends in brackets and exists is a path. With `download`, a named
            set that is missing is fetched first.

    Returns:
        uint8 images, (image_size, image_size) pixels where that is set; in memory, or read from
        their files as they are needed (`FileSplit`).

    Raises:
        RtkError: where the name is unknown, the data are missing or damaged, or the subset is bad.
    """
    name = config.name
    kind, colon, path = name.partition(":")
    picks: list[int] | None = None
    if kind in _TAKE_A_PATH:
        whole = any(candidate.exists() for candidate in candidate_paths(path, config))
        subset = None
        if not whole:
            path, subset = split_name(path)
        if not path:
            raise RtkError(f"{name!r} names no path; write {kind}:PATH")
    else:
        base, subset = split_name(name)
        if subset is None and ("[" in name or "]" in name):
            raise RtkError(
                f"{name!r}: the class subset is malformed; write e.g. digits[0-4] or "
                "cifar10[0,2,5-7]"
            )
        kind, colon, path = base.partition(":")
        if kind in CATALOGUE and CATALOGUE[kind].segmentation:
            raise RtkError(
                f"{kind} has a mask for each image, no label: it is for segmentation "
                "(`rtk transfer --mode segment`)"
            )
        try:
            check_choice("data set", kind, [n for n in DATA_SETS.names() if n not in _TAKE_A_PATH])
        except RtkError as error:
            raise RtkError(
                f"{error} (your own images: npz:PATH for arrays, folder:PATH for a folder)"
            ) from None
        if colon:
            raise RtkError(f"{name!r}: {kind} takes no path; npz:PATH and folder:PATH do")
    if subset is not None:
        picks = parse_classes(subset, name)
    if config.download and kind in CATALOGUE:
        distributed.from_main(get, kind, config)
    dataset = DATA_SETS.get(kind)(path, config)
    if picks is not None:
        dataset = take_classes(dataset, picks)
    if config.image_size is not None:
        dataset = _resize(dataset, config.image_size)
    return replace(dataset, name=name)


def _resize(dataset: Dataset, size: int) -> Dataset:
    """Resize to (size, size) by antialiased bilinear interpolation, rounded back to uint8."""
    if dataset.train.size == (size, size):
        return dataset
    check_memory(dataset.name, sum(map(len, dataset.splits().values())), size, size)

    def resized(part: str, split: Split) -> Split:
        images = torch.empty(len(split), 3, size, size, dtype=torch.uint8)
        for source, target in zip(split.images.split(512), images.split(512), strict=True):
            values = interpolate(source.float(), (size, size), mode="bilinear", antialias=True)
            target.copy_(values.round_().clamp_(0, 255))
        return Split(images, split.labels)

    return dataset.map_splits(resized)
