"""Segmentation sets, an image and a mask of its classes each, and the batches drawn from them.

A new set is one file with one `@SEGMENTATION_SETS.register(...)`, imported here.
"""

from rtk.data.segmentation import arrays, digits, voc  # noqa: F401  (they register themselves)
from rtk.data.segmentation.batches import SegmentationBatches, WholeImages
from rtk.data.segmentation.dataset import (
    IGNORED,
    SEGMENTATION_SETS,
    SegmentationDataset,
    SegmentationSplit,
)
from rtk.data.segmentation.resolve import load

__all__ = [
    "IGNORED",
    "SEGMENTATION_SETS",
    "SegmentationBatches",
    "SegmentationDataset",
    "SegmentationSplit",
    "WholeImages",
    "load",
]
