"""Image classification sets, held as uint8 tensors, and the batches that are drawn from them.

A new set is one file with one `@DATA_SETS.register(...)`, imported here.
"""

from rtk.data import arrays, cifar, digits, folder  # noqa: F401  (they register themselves)
from rtk.data.augment import AUGMENTATIONS
from rtk.data.batches import Batches, epoch_order
from rtk.data.dataset import DATA_SETS, Dataset, Split, channel_stats, data_root
from rtk.data.resolve import load

__all__ = [
    "AUGMENTATIONS",
    "DATA_SETS",
    "Batches",
    "Dataset",
    "Split",
    "channel_stats",
    "data_root",
    "epoch_order",
    "load",
]
