"""PASCAL VOC 2012, with or without the training masks of the Semantic Boundaries Dataset."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import SBDataset, VOCSegmentation

from rtk import distributed
from rtk.config import DataConfig
from rtk.data.catalogue import CATALOGUE
from rtk.data.dataset import data_root
from rtk.data.download import get
from rtk.data.segmentation.dataset import (
    SEGMENTATION_SETS,
    SegmentationDataset,
    pad_together,
)
from rtk.errors import RtkError

CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
_SBD_FOLDERS = ("sbd", "benchmark_RELEASE/dataset")

Pair = tuple[Tensor, Tensor]


def _read(dataset: Any, wanted: Callable[[str], bool] = lambda stem: True) -> list[Pair]:
    """Return images (3, h, w) and masks (h, w), uint8, of the samples whose name is wanted."""

    def pair(index: int) -> Pair:
        file = dataset.images[index]
        try:
            image, mask = dataset[index]
            array = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
            return torch.from_numpy(array.copy()), torch.from_numpy(np.array(mask, np.uint8))
        except Exception as error:  # PIL's and scipy's readers raise nearly anything
            raise RtkError(
                f"{file} or its mask cannot be read ({error}); unpack the set again"
            ) from error

    indices = [i for i, file in enumerate(dataset.images) if wanted(Path(file).stem)]
    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    try:
        return list(pool.map(pair, indices))
    finally:
        pool.shutdown(cancel_futures=True)


def _voc(config: DataConfig, part: str) -> Any:
    entry = CATALOGUE["voc2012"]
    if config.download:
        distributed.from_main(get, entry.name, config)
    base = entry.found(data_root(config))
    if base is None:
        raise entry.missing(config)
    try:
        return VOCSegmentation(base, year="2012", image_set=part)
    except (RuntimeError, OSError) as error:
        raise RtkError(
            f"voc2012: {base / entry.folder} has no list of its {part} images ({error}); "
            f"remove it and `rtk data get voc2012`"
        ) from error


def _sbd(config: DataConfig, part: str) -> Any:
    folders = [data_root(config) / name for name in _SBD_FOLDERS]
    folder = next((candidate for candidate in folders if candidate.is_dir()), folders[0])
    try:
        return SBDataset(folder, image_set=part, mode="segmentation")
    except (RuntimeError, OSError) as error:
        raise RtkError(
            f"voc2012+sbd: no Semantic Boundaries Dataset with img, cls, train.txt and val.txt in "
            f"{' or '.join(map(str, folders))}; unpack {SBDataset.url} there, or name another "
            "folder with --data.root or RTK_DATA"
        ) from error


def _dataset(name: str, train: list[Pair], test: list[Pair]) -> SegmentationDataset:
    return SegmentationDataset(
        name, CLASSES, pad_together(name, train), pad_together(name, test), None
    )


@SEGMENTATION_SETS.register("voc2012")
def voc2012(path: str, config: DataConfig) -> SegmentationDataset:
    """Return VOC 2012: its 1,464 training images, tested on its 1,449 validation images.

    (The labels of its test images are not public.) 21 classes, background included; the outlines
    of objects are ignored. Source: http://host.robots.ox.ac.uk/pascal/VOC/voc2012, through
    torchvision.datasets.VOCSegmentation.
    """
    train, test = (_read(_voc(config, part)) for part in ("train", "val"))
    return _dataset("voc2012", train, test)


@SEGMENTATION_SETS.register("voc2012+sbd")
def voc2012_augmented(path: str, config: DataConfig) -> SegmentationDataset:
    """Return VOC 2012 with the "augmented" training set of 10,582 images (Hariharan et al. 2011).

    SBD's training and validation images but those that VOC tests on; an image that VOC itself
    labels for training keeps VOC's mask. SBD has no ignored outlines. Source:
    torchvision.datasets.SBDataset, in the data root's sbd or benchmark_RELEASE/dataset.
    """
    own, test = _voc(config, "train"), _voc(config, "val")
    known = {Path(file).stem for file in (*own.images, *test.images)}
    train = _read(own)
    for part in ("train", "val"):
        train += _read(_sbd(config, part), lambda stem: stem not in known)
    return _dataset("voc2012+sbd", train, _read(test))
