"""Batches of images with masks that lie on the device; nothing of them but a seed is random."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rtk.data.augment import draw_flips
from rtk.data.batches import _generator, epoch_order
from rtk.data.segmentation.augment import Views, draw_views, look, whole_views
from rtk.data.segmentation.dataset import SegmentationSplit
from rtk.errors import RtkError, check_choice

AUGMENTATIONS = ("none", "flip", "scale_crop_flip")
_MOST_PIXELS = 2**22  # at a time where whole images are looked at: 16 of 513 x 513


class SegmentationBatches:
    """Shuffled, augmented batches of images and masks that are moved to the device once.

    Order and augmentation are pure functions of (seed, epoch, step), as those of
    `rtk.data.Batches` are, and torch's global random state is never touched.

    Args:
        split: images and masks.
        batch_size: images a step, >= 1; a smaller last batch is left out, but where it is all.
        augment: none, flip, or scale_crop_flip: scaled by 0.5 to 2, a window of crop_size, half of
            them mirrored. The others yield whole images.
        crop_size: side of the windows of scale_crop_flip, in pixels.
        epoch_steps: steps of an epoch, which goes on where the last one stopped in the images;
            None: each epoch is one pass over them.
        seed: of order and augmentation.
        device: where images and masks lie.
        channels_last: yield images in torch.channels_last.

    Raises:
        RtkError: where a number is below 1 or the augmentation is unknown.
    """

    def __init__(
        self,
        split: SegmentationSplit,
        batch_size: int,
        *,
        augment: str = "none",
        crop_size: int | None = None,
        epoch_steps: int | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
    ) -> None:
        check_choice("segmentation augmentation", augment, AUGMENTATIONS)
        if augment == "scale_crop_flip" and crop_size is None:
            raise RtkError("scale_crop_flip needs crop_size, the side of its windows in pixels")
        numbers = {"batch_size": batch_size, "crop_size": crop_size, "epoch_steps": epoch_steps}
        for name, number in numbers.items():
            if number is not None and number < 1:
                raise RtkError(f"{name}: expected at least 1, got {number}")
        self.device = torch.device(device)
        self.images = split.images.to(self.device)
        self.masks = split.masks.to(self.device)
        self.sizes = _sizes(split)
        self.batch_size = batch_size
        self.augment = augment
        self.crop_size = crop_size
        self.epoch_steps = epoch_steps
        self.seed = seed
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    @property
    def _pass_steps(self) -> int:
        return max(1, len(self.images) // self.batch_size)

    def __len__(self) -> int:
        """Return the number of steps of an epoch."""
        return self.epoch_steps or self._pass_steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch from step `start` on.

        Args:
            epoch: >= 0.
            start: first step, in [0, len(self)]; the batches are those of a whole epoch.

        Returns:
            An iterator over images, float32 (B, 3, H, W) in [0, 1], and masks, int64 (B, H, W).

        Raises:
            RtkError: where epoch or start is out of range.
        """
        if epoch < 0 or not 0 <= start <= len(self):
            raise RtkError(
                f"epoch {epoch}, start {start}: expected epoch >= 0 and start in 0..{len(self)}"
            )
        return self._steps(epoch * len(self) + start, (epoch + 1) * len(self))

    def _steps(self, first: int, end: int) -> Iterator[tuple[Tensor, Tensor]]:
        order, ordered = torch.empty(0), -1
        for step in range(first, end):
            turn, place = divmod(step, self._pass_steps)
            if turn != ordered:
                order, ordered = epoch_order(len(self.images), self.seed, turn), turn
            chosen = order[place * self.batch_size : (place + 1) * self.batch_size]
            sizes = self.sizes[chosen]
            views = self._views(sizes, turn, place)
            index = chosen.to(self.device, non_blocking=True)
            images, masks = look(self.images[index], self.masks[index], sizes, views)
            yield images.contiguous(memory_format=self.memory_format), masks

    def _views(self, sizes: Tensor, turn: int, place: int) -> Views:
        generator = _generator(self.seed, "image", turn, place)
        if self.augment == "scale_crop_flip":
            assert self.crop_size is not None
            return draw_views(sizes, self.crop_size, generator)
        flips = torch.zeros(len(sizes), dtype=torch.bool)
        if self.augment == "flip":
            flips = draw_flips(len(sizes), generator)
        height, width = self.images.shape[2:]
        return whole_views(sizes, (height, width), flips)


class WholeImages:
    """Each image once, as it is and at its full size, for evaluation.

    Images of different sizes are never in one batch, so none is padded.

    Args:
        split: images and masks.
        batch_size: images at a time, >= 1; fewer where they are large: up to 2**22 pixels.
        device: where they are yielded; the split stays where it is.

    Raises:
        RtkError: where the batch size is below 1.
    """

    def __init__(
        self, split: SegmentationSplit, batch_size: int, *, device: torch.device | str = "cpu"
    ) -> None:
        if batch_size < 1:
            raise RtkError(f"batch_size: expected at least 1 image, got {batch_size}")
        self.split = split
        self.batch_size = batch_size
        self.device = torch.device(device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images, float32 (B, 3, H, W) in [0, 1], and masks, int64 (B, H, W)."""
        kinds, which = _sizes(self.split).unique(dim=0, return_inverse=True)
        for kind, (height, width) in enumerate(kinds.tolist()):
            count = min(self.batch_size, max(1, _MOST_PIXELS // (height * width)))
            for index in (which == kind).nonzero()[:, 0].split(count):
                images = self.split.images[index, :, :height, :width].to(self.device)
                masks = self.split.masks[index, :height, :width].to(self.device)
                yield images.float().div_(255), masks.long()


def _sizes(split: SegmentationSplit) -> Tensor:
    """Return height and width of each image, (N, 2) int64."""
    if split.sizes is not None:
        return split.sizes
    return torch.tensor(split.masks.shape[1:]).expand(len(split), 2)
