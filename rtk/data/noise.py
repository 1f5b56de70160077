"""gaussian-noise and uniform-noise: images of nothing, to tell from images of something."""

from __future__ import annotations

from functools import partial

import torch
from torch import Generator, Tensor

from rtk.config import DataConfig
from rtk.data.dataset import DATA_SETS, Dataset, Split

COUNT = 2000
IMAGE_SIZE = 32  # pixels, where data.image_size is not set


def _pixels(kind: str, size: int, seed: int) -> Tensor:
    generator = Generator().manual_seed(seed)
    images = torch.empty(COUNT, 3, size, size, dtype=torch.uint8)
    for chunk in images.split(100):
        if kind == "uniform":
            chunk.random_(0, 256, generator=generator)
        else:
            values = torch.randn(chunk.shape, generator=generator) * 0.25 + 0.5
            chunk.copy_((values * 255).round().clamp(0, 255))
    return images


def _noise(kind: str, path: str, config: DataConfig) -> Dataset:
    """Return 2,000 images of independent pixels, and as many to train on, of one class.

    Uniform pixels are 0..255; Gaussian ones have mean 0.5 and deviation 0.25 in [0, 1] scale,
    clipped. The same images on every machine, as far as torch's generator is the same.
    """
    size = config.image_size or IMAGE_SIZE
    train, test = (
        Split(_pixels(kind, size, seed), torch.zeros(COUNT, dtype=torch.int64)) for seed in (0, 1)
    )
    return Dataset(f"{kind}-noise", ("noise",), train, test, None, "none")


for _kind in ("gaussian", "uniform"):
    DATA_SETS.register(f"{_kind}-noise")(partial(_noise, _kind))
