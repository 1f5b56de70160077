"""The augmentation of images together with their masks: random scale, crop and flip, in one gather.

N C H W: images. Random numbers are drawn on the CPU, so a batch is the same on every device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import grid_sample

from rtk.data.augment import draw_flips
from rtk.data.segmentation.dataset import IGNORED

SCALE = (0.5, 2.0)


@dataclass(frozen=True, eq=False)
class Views:
    """What is seen of each image: a window of the image scaled, mirrored or not.

    Args:
        scaled: (N, 2) int64 height and width in pixels that the image is scaled to.
        corner: (N, 2) int64 row and column of the window's first pixel in the scaled image.
        flips: (N,) bool, mirror the window left to right.
        window: height and width of the window; what lies beyond the image is black and ignored.
    """

    scaled: Tensor
    corner: Tensor
    flips: Tensor
    window: tuple[int, int]


def draw_views(sizes: Tensor, crop: int, generator: Generator) -> Views:
    """Draw a scale, a crop and a flip for each image.

    As DeepLab trains (Chen et al. 2018): a scale uniform in SCALE, the same for both sides; a
    window of crop x crop pixels anywhere in the scaled image, which is padded at the bottom and on
    the right where it is smaller; half of the windows mirrored.

    Args:
        sizes: (N, 2) int64 height and width of the images.
        crop: side of the window, in pixels.
        generator: on the CPU.
    """
    count = len(sizes)
    scale, *places = torch.rand(3, count, generator=generator, dtype=torch.float64)
    scale = SCALE[0] + (SCALE[1] - SCALE[0]) * scale
    scaled = (sizes * scale[:, None]).round().long().clamp_min(1)
    room = (scaled - crop).clamp_min(0) + 1
    corner = (torch.stack(places, 1) * room).long()
    return Views(scaled, corner, draw_flips(count, generator), (crop, crop))


def whole_views(sizes: Tensor, window: tuple[int, int], flips: Tensor) -> Views:
    """Return the images as they are, or mirrored, in the corner of a window that holds them all."""
    return Views(sizes, torch.zeros_like(sizes), flips, window)


def look(images: Tensor, masks: Tensor, sizes: Tensor, views: Views) -> tuple[Tensor, Tensor]:
    """Return what `views` show: the images interpolated bilinearly, the masks by nearest pixel.

    Both are read at the same places, so a mask stays on its image to the pixel.

    Args:
        images: (N, C, H, W) uint8.
        masks: (N, H, W) uint8.
        sizes: (N, 2) int64 height and width of each image, which lies in the upper left corner.
        views: of N images.

    Returns:
        (N, C, *window) float32 in [0, 1], 0 beyond the image, and (N, *window) int64 masks, 255
        there.
    """
    device = images.device
    flips = views.flips.to(device, non_blocking=True)
    places, inside = [], []
    for axis in (0, 1):
        size, scaled, corner = (
            values[:, axis, None].to(device, non_blocking=True)
            for values in (sizes, views.scaled, views.corner)
        )
        steps = torch.arange(views.window[axis], device=device)
        if axis == 1:
            steps = torch.where(flips[:, None], steps.flip(0), steps)
        at = corner + steps
        inside.append(at < scaled)
        place = (at + 0.5) * (size / scaled) - 0.5  # in pixels of the image
        places.append(torch.minimum(place.clamp_min(0), size - 1.0))
    rows, columns = places
    seen = inside[0][:, :, None] & inside[1][:, None, :]
    height, width = images.shape[2:]
    # grid_sample with align_corners=False: -1 and 1 are the outer edges of the first, last pixel.
    grid = torch.stack(
        [
            ((2 * columns + 1) / width - 1)[:, None, :].expand_as(seen),
            ((2 * rows + 1) / height - 1)[:, :, None].expand_as(seen),
        ],
        3,
    )
    source = images.float().div_(255)
    values = grid_sample(source, grid, mode="bilinear", align_corners=False).clamp_(0, 1)
    values.mul_(seen[:, None])
    index = (rows + 0.5).long()[:, :, None] * width + (columns + 0.5).long()[:, None, :]
    labels = masks.flatten(1).gather(1, index.flatten(1)).view(seen.shape).long()
    return values, labels.masked_fill_(~seen, IGNORED)
