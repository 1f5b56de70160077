"""Batches of a split, in an order and with augmentation that depend on nothing but the seed."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections import abc
from collections.abc import Iterator

import torch
from torch import Generator, Tensor

from rtk.data.augment import AUGMENTATIONS
from rtk.data.dataset import Split
from rtk.data.files import FileSplit
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


def share_of(count: int, rank: int, ranks: int) -> slice:
    """Return the share of process `rank` of a batch of `count` images: neighbours in the batch.

    A batch of fewer than two images a process is everybody's: batch norm cannot train on one.
    """
    if count < 2 * ranks:
        return slice(0, count)
    return slice(rank * count // ranks, (rank + 1) * count // ranks)


class Batches:
    """Shuffled, augmented batches of a split, on a device.

    Images in memory are moved to the device once; those of a `FileSplit` are decoded by worker
    processes while the device is busy with the batches before. There, resized_crop takes its parts
    from the whole images and at the size of the split; all else works on the centre.

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
        self._files = split if isinstance(split, FileSplit) else None
        # Parts of whole images are cut out where these are decoded, not from their centres here.
        self._crop_files = self._files is not None and augment == "resized_crop"
        if self._files is None:
            self.images = split.images.to(self.device)
        self.labels = split.labels.to(self.device)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = seed
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._rank, self._ranks = 0, 1

    def share(self, rank: int, ranks: int) -> Batches:
        """Return the same batches, of which only the share of one of `ranks` processes is made.

        Order and augmentation are those of the whole: the processes together see what one would.
        """
        shared = copy.copy(self)
        shared._rank, shared._ranks = rank, ranks
        return shared

    def images_in(self, step: int) -> int:
        """Return how many images the whole batch of a step has."""
        return min(self.batch_size, len(self.labels) - step * self.batch_size)

    def __len__(self) -> int:
        """Return the number of steps of an epoch."""
        whole, rest = divmod(len(self.labels), self.batch_size)
        return whole if self.drop_last and whole else whole + (rest > 0)

    def epoch(self, epoch: int, start: int = 0, every: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch from step `start` on.

        Args:
            epoch: >= 0.
            start: first step, in [0, len(self)]; the batches are those of a whole epoch.
            every: steps from one batch to the next that is made, >= 1.

        Returns:
            An iterator over images, float32 (B, 3, H, W) in [0, 1], and labels, int64 (B,).

        Raises:
            RtkError: where epoch or start is out of range.
        """
        if epoch < 0 or not 0 <= start <= len(self):
            raise RtkError(
                f"epoch {epoch}, start {start}: expected epoch >= 0 and start in 0..{len(self)}"
            )
        return self._steps(epoch, range(start, len(self), every))

    def _share(self, step: int) -> slice:
        """Return which samples of the epoch this process takes in a step."""
        first = step * self.batch_size
        own = share_of(self.images_in(step), self._rank, self._ranks)
        return slice(first + own.start, first + own.stop)

    def _steps(self, epoch: int, steps: range) -> Iterator[tuple[Tensor, Tensor]]:
        order = epoch_order(len(self.labels), self.seed, epoch) if self.shuffle else None
        on_device = None if order is None else order.to(self.device)
        with contextlib.ExitStack() as stack:
            decoded = None
            if self._files is not None:
                # Closed here, and its workers with it: Python 3.12.3 keeps the locals of generators
                # that are closed.
                source = self._decoded(self._files, order, epoch, steps)
                decoded = stack.enter_context(contextlib.closing(source))
            for step in steps:
                chosen = self._share(step)
                index = chosen if on_device is None else on_device[chosen]
                if decoded is None:
                    images = self.images[index]
                else:
                    images = next(decoded).to(self.device, non_blocking=True)
                if not self._crop_files:
                    first = chosen.start - step * self.batch_size
                    part = () if self._ranks == 1 else ((first, self.images_in(step)),)
                    images = self._augment(images, self._random(epoch, step), *part)
                values = images.to(torch.float32, memory_format=self.memory_format)
                if not images.is_floating_point():
                    values.div_(255)
                yield values, self.labels[index]

    def _random(self, epoch: int, step: int) -> Generator:
        return _generator(self.seed, "image", epoch, step)

    def _decoded(
        self, split: FileSplit, order: Tensor | None, epoch: int, steps: range
    ) -> abc.Generator[Tensor]:
        """Return the images of these steps, cropped at random if that is wanted."""
        order = torch.arange(len(split)) if order is None else order
        indices = [order[self._share(step)] for step in steps]
        seeds = (self._seeds(epoch, step) for step in steps) if self._crop_files else None
        return split.stream(indices, seeds, pin=self.device.type == "cuda")

    def _seeds(self, epoch: int, step: int) -> list[int]:
        """Return a seed for each image of this process's share: those that the batch gives them."""
        count = self.images_in(step)
        drawn = torch.randint(2**63 - 1, (count,), generator=self._random(epoch, step))
        return drawn[share_of(count, self._rank, self._ranks)].tolist()
