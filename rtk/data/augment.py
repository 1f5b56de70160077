"""Augmentations of a whole batch at once, on its device.

N C H W: images. Random numbers are drawn on the CPU, so a batch is the same on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn.functional import grid_sample, pad

from rtk.registry import Registry

# (N, C, H, W) uint8 and a CPU generator -> the same shape, uint8 or float32 in [0, 1]. With a third
# argument, a `Part`, the images are a part of a batch and get what they would get in the whole.
Augmentation = Callable[..., Tensor]
Part = tuple[int, int]  # index of the first image in the batch, number of images of the batch
AUGMENTATIONS: Registry[Augmentation] = Registry("augmentation")

SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)


def _drawn_for(images: Tensor, part: Part | None) -> tuple[int, slice]:
    """Return for how many images to draw, and which of the draws are those of `images`."""
    first, count = (0, len(images)) if part is None else part
    return count, slice(first, first + len(images))


def draw_flips(count: int, generator: Generator) -> Tensor:
    """Return (count,) bool, True with probability one half."""
    return torch.randint(0, 2, (count,), generator=generator).bool()


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flips: Tensor, border: int) -> Tensor:
    """Pad with zeros, crop each image back to its size and mirror some, in one gather.

    Args:
        images: (N, C, H, W) of any dtype.
        top: (N,) int64 in [0, 2 border], first row of the crop in the padded image.
        left: (N,) int64 in [0, 2 border], first column.
        flips: (N,) bool, mirror the crop left to right.
        border: zeros on each side, in pixels.

    Returns:
        (N, C, H, W), the dtype of `images`.
    """
    n, c, h, w = images.shape
    device = images.device
    top, left, flips = (t.to(device, non_blocking=True) for t in (top, left, flips))
    padded = pad(images, (border,) * 4) if border else images
    rows = top[:, None] + torch.arange(h, device=device)
    columns = torch.arange(w, device=device)
    columns = left[:, None] + torch.where(flips[:, None], w - 1 - columns, columns)
    index = rows[:, :, None] * (w + 2 * border) + columns[:, None, :]
    flat = padded.reshape(n, c, -1)
    return flat.gather(2, index.view(n, 1, -1).expand(-1, c, -1)).view(n, c, h, w)


def draw_boxes(count: int, height: int, width: int, generator: Generator) -> Tensor:
    """Return (count, 4) float32 boxes (top, left, height, width) in whole pixels.

    Sampled as torchvision's RandomResizedCrop does: an area in SCALE of the image's, an aspect
    ratio log-uniform in RATIO, the first of ten tries that fits, else the whole image brought to
    a ratio in RATIO about its centre.
    """
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    u = torch.rand(4, count, 10, generator=generator, dtype=torch.float64)
    area = height * width * (SCALE[0] + (SCALE[1] - SCALE[0]) * u[0])
    ratio = torch.exp(low + (high - low) * u[1])
    h, w = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)
    h, w = h.gather(1, first)[:, 0], w.gather(1, first)[:, 0]
    top = (u[2, :, 0] * (height - h + 1)).floor()
    left = (u[3, :, 0] * (width - w + 1)).floor()
    whole_w = min(width, round(height * RATIO[1]))
    whole_h = min(height, round(width / RATIO[0]))
    whole = torch.tensor(
        [(height - whole_h) // 2, (width - whole_w) // 2, whole_h, whole_w], dtype=torch.float64
    )
    boxes = torch.stack([top, left, h, w], 1)
    return torch.where(fits.any(1, keepdim=True), boxes, whole).float()


def resize_boxes(images: Tensor, boxes: Tensor, flips: Tensor) -> Tensor:
    """Resize one box of each image to the whole image, bilinearly, and mirror some.

    A box is never larger than the image, so this only enlarges and antialiasing would do nothing.

    Args:
        images: (N, C, H, W) uint8.
        boxes: (N, 4) float32 (top, left, height, width) in pixels, inside the image.
        flips: (N,) bool, mirror the result left to right.

    Returns:
        (N, C, H, W) float32 in [0, 1].
    """
    _, _, h, w = images.shape
    device = images.device
    top, left, box_h, box_w = boxes.to(device, non_blocking=True)[:, :, None].unbind(1)

    def positions(size: int, start: Tensor, extent: Tensor) -> Tensor:
        """(N, size) source positions in pixels; held inside the box, as resizing a crop would."""
        centres = (torch.arange(size, device=device) + 0.5) * (extent / size) - 0.5
        return start + torch.minimum(centres.clamp_min(0), extent - 1)

    rows, columns = positions(h, top, box_h), positions(w, left, box_w)
    columns = torch.where(flips.to(device, non_blocking=True)[:, None], columns.flip(1), columns)
    # grid_sample with align_corners=False: -1 and 1 are the outer edges of the first, last pixel.
    grid_y, grid_x = (2 * rows + 1) / h - 1, (2 * columns + 1) / w - 1
    grid = torch.stack(
        [grid_x[:, None, :].expand(-1, h, -1), grid_y[:, :, None].expand(-1, -1, w)], 3
    )
    source = images.float().div_(255)
    return grid_sample(source, grid, mode="bilinear", align_corners=False).clamp_(0, 1)


def _shifted(images: Tensor, generator: Generator, part: Part | None, *, flip: bool) -> Tensor:
    h, w = images.shape[2:]
    n, own = _drawn_for(images, part)
    border = max(1, max(h, w) // 8)
    top, left = torch.randint(0, 2 * border + 1, (2, n), generator=generator)
    flips = draw_flips(n, generator) if flip else torch.zeros(n, dtype=torch.bool)
    return crop_and_flip(images, top[own], left[own], flips[own], border)


@AUGMENTATIONS.register("none")
def none(images: Tensor, generator: Generator, part: Part | None = None) -> Tensor:
    """Return the images as they are."""
    return images


@AUGMENTATIONS.register("flip")
def flip(images: Tensor, generator: Generator, part: Part | None = None) -> Tensor:
    """Mirror each image left to right with probability one half."""
    zeros = torch.zeros(len(images), dtype=torch.int64)
    n, own = _drawn_for(images, part)
    return crop_and_flip(images, zeros, zeros, draw_flips(n, generator)[own], 0)


@AUGMENTATIONS.register("crop")
def crop(images: Tensor, generator: Generator, part: Part | None = None) -> Tensor:
    """Pad by an eighth of the side (at least 1 pixel) with zeros, crop at random, flip half."""
    return _shifted(images, generator, part, flip=True)


@AUGMENTATIONS.register("shift")
def shift(images: Tensor, generator: Generator, part: Part | None = None) -> Tensor:
    """`crop` without the flip, for images whose mirror image means something else."""
    return _shifted(images, generator, part, flip=False)


@AUGMENTATIONS.register("resized_crop")
def resized_crop(images: Tensor, generator: Generator, part: Part | None = None) -> Tensor:
    """RandomResizedCrop (scale 0.08..1, ratio 3/4..4/3) to the same size and flip half.

    Returns float32 in [0, 1]. Source: Szegedy et al. 2015, as torchvision samples it.
    """
    h, w = images.shape[2:]
    n, own = _drawn_for(images, part)
    boxes = draw_boxes(n, h, w, generator)
    return resize_boxes(images, boxes[own], draw_flips(n, generator)[own])
