"""Image classification sets, uint8 tensors or files, and the batches that are drawn from them.

A new set is one file with one `@DATA_SETS.register(...)`, imported here; one that torchvision reads
is an entry of `rtk.data.catalogue`.
"""

from rtk.data import arrays, cifar, digits, folder, named, noise  # noqa: F401  (they register)
from rtk.data.augment import AUGMENTATIONS
from rtk.data.batches import Batches, epoch_order, share_of
from rtk.data.catalogue import CATALOGUE
from rtk.data.dataset import DATA_SETS, Dataset, Split, channel_stats, data_root
from rtk.data.files import FileSplit
from rtk.data.keep import keep_loaded
from rtk.data.resolve import load

__all__ = [
    "AUGMENTATIONS",
    "CATALOGUE",
    "DATA_SETS",
    "Batches",
    "Dataset",
    "FileSplit",
    "Split",
    "channel_stats",
    "data_root",
    "epoch_order",
    "keep_loaded",
    "load",
    "share_of",
]
