"""Batches of a split that lies on the device, in an order that depends on nothing but the seed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Generator, Tensor

from rtk.data.augment import AUGMENTATIONS
from rtk.data.dataset import Split
from rtk.errors import RtkError


def _generator(*key: object) -> Generator:
    """Return a CPU generator that is a pure function of `key`.

    Hashed, not summed, so that neighbouring seeds, epochs and steps share no stream; Python's own
    hash() of a string differs between processes.
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """Return a permutation of `count` samples, (count,) int64: a function of the arguments."""
    return torch.randperm(count, generator=_generator(seed, "order", epoch))


class Batches:
    """Shuffled, augmented batches of a split whose images are moved to the device once.

    Order and augmentation are pure functions of (seed, epoch, step): a run that stops inside an
    epoch goes on bit for bit, and torch's global random state is never touched.

    Args:
        split: uint8 images and their labels.
        batch_size: images a step, >= 1.
        augment: none, flip, crop, shift or resized_crop (not auto: see `Dataset.augment`).
        shuffle: a new order each epoch, else the split's.
        drop_last: leave out a smaller last batch; a split smaller than a batch keeps it.
        seed: of order and augmentation.
        device: where images and labels lie.
        channels_last: yield images in torch.channels_last.

    Raises:
        RtkError: where the batch size is below 1 or the augmentation is unknown.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        augment: str = "none",
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
    ) -> None:
        if batch_size < 1:
            raise RtkError(f"batch_size: expected at least 1 image, got {batch_size}")
        self._augment = AUGMENTATIONS.get(augment)
        self.device = torch.device(device)
        self.images = split.images.to(self.device)
        self.labels = split.labels.to(self.device)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = seed
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __len__(self) -> int:
        """Return the number of steps of an epoch."""
        whole, rest = divmod(len(self.labels), self.batch_size)
        return whole if self.drop_last and whole else whole + (rest > 0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch from step `start` on.

        Args:
            epoch: >= 0.
            start: first step, in [0, len(self)]; the batches are those of a whole epoch.

        Returns:
            An iterator over images, float32 (B, 3, H, W) in [0, 1], and labels, int64 (B,).

        Raises:
            RtkError: where epoch or start is out of range.
        """
        if epoch < 0 or not 0 <= start <= len(self):
            raise RtkError(
                f"epoch {epoch}, start {start}: expected epoch >= 0 and start in 0..{len(self)}"
            )
        return self._steps(epoch, start)

    def _steps(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = None
        if self.shuffle:
            order = epoch_order(len(self.labels), self.seed, epoch).to(self.device)
        for step in range(start, len(self)):
            chosen = slice(step * self.batch_size, (step + 1) * self.batch_size)
            index = chosen if order is None else order[chosen]
            images = self._augment(self.images[index], _generator(self.seed, "image", epoch, step))
            values = images.to(torch.float32, memory_format=self.memory_format)
            if not images.is_floating_point():
                values.div_(255)
            yield values, self.labels[index]
