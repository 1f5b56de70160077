"""Splits whose images stay in their files, and data sets made of lists of files."""

from __future__ import annotations

import os
import signal
import warnings
from collections import abc
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from itertools import repeat
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from rtk import distributed
from rtk.config import DataConfig
from rtk.data.augment import draw_boxes, draw_flips
from rtk.data.dataset import Dataset, Split, check_memory
from rtk.data.images import (
    GREY_MODES,
    LARGE,
    decode,
    map_threads,
    open_image,
    to_rgb,
    to_square,
    undecodable,
)
from rtk.errors import RtkError

if TYPE_CHECKING:
    from PIL import Image

# The files of a batch and, where random parts of them are wanted, a seed for each.
Job = tuple[list[str], list[int] | None]


# Of a data set: train, test and perhaps val: files and their labels, (N,) int64.
Parts = dict[str, tuple[list[str], Tensor]]


class FileSplit(Split):
    """A split whose images are decoded when a batch needs them.

    Args:
        files: of the images, N >= 1.
        labels: (N,) int64, >= 0.
        side: height and width of the images that come out, in pixels.
        shorter: pixels of the shorter side before the centre is cropped (`to_square`).
        workers: processes that decode; None is one a CPU, at most 16; 0 decodes in this process.

    Raises:
        RtkError: where lengths differ or there is no file.
    """

    streamed = True

    def __init__(
        self,
        files: Sequence[str],
        labels: Tensor,
        side: int,
        shorter: int,
        workers: int | None = None,
    ) -> None:
        if len(files) != len(labels):
            raise RtkError(f"{len(files)} files but {len(labels)} labels: their lengths differ")
        if not len(files):
            raise RtkError("a split holds no image; expected at least one")
        object.__setattr__(self, "labels", labels)
        self.files = list(files)
        self.side = side
        self.shorter = shorter
        self.workers = workers

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images that come out, in pixels."""
        return self.side, self.side

    @cached_property
    def images(self) -> Tensor:  # type: ignore[override]
        """All images at once, (N, 3, H, W) uint8, where they fit into memory (else an RtkError)."""
        check_memory("reading all images at once", len(self), *self.size)
        return decode(self.files, *self.size, self.shorter)

    def select(self, index: Tensor) -> FileSplit:
        """Return the samples `index`, (N,) bool, or (M,) int64 in that order."""
        chosen = torch.arange(len(self))[index].tolist()
        return self._with([self.files[i] for i in chosen], self.labels[index])

    def relabel(self, labels: Tensor) -> FileSplit:
        """Return the same files with other labels, (N,) int64."""
        return self._with(self.files, labels)

    def sample(self, count: int) -> Tensor:
        """Return `count` evenly spaced images, (M, 3, H, W) uint8; all where there are fewer."""
        count = min(count, len(self))
        chosen = [self.files[i * len(self) // count] for i in range(count)]
        return decode(chosen, *self.size, self.shorter)

    def _with(self, files: Sequence[str], labels: Tensor) -> FileSplit:
        return FileSplit(files, labels, self.side, self.shorter, self.workers)

    def stream(
        self, indices: Sequence[Tensor], seeds: Iterable[list[int]] | None = None, *, pin: bool
    ) -> abc.Generator[Tensor]:
        """Yield the images of each index tensor, (B, 3, H, W) uint8, decoded ahead by workers.

        Args:
            indices: (B,) int64 on the CPU, one for each batch.
            seeds: for each batch, a seed for each image: a random part of the image, resized
                (RandomResizedCrop) and flipped half of the time, is then what comes out, a pure
                function of the seed. None gives the centre.
            pin: yield pinned memory, for copies to a GPU that do not wait.

        Raises:
            RtkError: for a file that cannot be decoded, or workers that die.
        """
        batches: Iterator[Job] = (
            ([self.files[i] for i in index.tolist()], own)
            for index, own in zip(indices, repeat(None) if seeds is None else seeds, strict=False)
        )
        workers = min(_cpus() if self.workers is None else self.workers, len(indices))
        loader = DataLoader(
            _Reader(self.side, self.shorter),
            batch_size=None,  # an item is a whole batch
            sampler=batches,  # type: ignore[arg-type]  # any iterable will do
            num_workers=workers,
            pin_memory=pin,
            generator=Generator(),  # else it draws from torch's global one
            worker_init_fn=_leave_interrupts_to_the_main_process if workers else None,
        )
        try:
            for images in loader:
                if isinstance(images, str):
                    raise RtkError(
                        f"{images}; `rtk data check` names all such files, and data.skip_bad true "
                        "leaves them out"
                    )
                yield images
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise RtkError(
                f"a process that decodes images died ({' '.join(str(error).split())}); with little "
                "shared memory (in a container: --shm-size) set data.workers to fewer, or to 0"
            ) from error


class _Reader(TorchDataset[Tensor]):
    """Turns jobs into batches. It holds no list of files: a million paths would be copied by each
    worker as soon as Python counts references to them."""

    def __init__(self, side: int, shorter: int) -> None:
        self.side = side
        self.shorter = shorter

    def __getitem__(self, job: Job) -> Tensor | str:  # type: ignore[override]
        """Return the images, or what is wrong: an exception would arrive as a traceback in text."""
        files, seeds = job
        images = torch.empty(len(files), 3, self.side, self.side, dtype=torch.uint8)
        try:
            for i, (file, row) in enumerate(zip(files, images.numpy(), strict=True)):
                use = self._centre if seeds is None else partial(self._part, seed=seeds[i])
                row[:] = np.asarray(open_image(file, use)).transpose(2, 0, 1)
        except RtkError as error:
            return str(error)
        return images

    def _centre(self, image: Image.Image) -> Image.Image:
        return to_square(to_rgb(image), self.shorter, self.side)

    def _part(self, image: Image.Image, seed: int) -> Image.Image:
        from PIL.Image import Resampling, Transpose

        image = to_rgb(image)
        generator = Generator().manual_seed(seed)
        top, left, height, width = map(
            int, draw_boxes(1, image.height, image.width, generator)[0].tolist()
        )
        part = image.crop((left, top, left + width, top + height))
        part = part.resize((self.side, self.side), Resampling.BILINEAR)
        if draw_flips(1, generator).item():
            part = part.transpose(Transpose.FLIP_LEFT_RIGHT)
        return part


def _cpus() -> int:
    """Return this process's share of the CPUs, at most 16; torchrun tells how many share them."""
    return max(1, min(16, len(os.sched_getaffinity(0)) // distributed.processes_here()))


def _leave_interrupts_to_the_main_process(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal; the loop finishes its step and saves first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def from_files(
    name: str,
    classes: Sequence[str],
    parts: Parts,
    config: DataConfig,
    *,
    side: tuple[int, int],
    shorter: int | None,
    stream: bool,
    augment: str | None = None,
    metric: str = "top1",
) -> Dataset:
    """Return the data set of these files, in memory or streamed.

    Args:
        name: for messages.
        classes: their names.
        parts: train, test and perhaps val: files and their labels, (N,) int64.
        config: its `workers` are followed.
        side: height and width of the images that come out, in pixels.
        shorter: see `to_square`; None where the images have the size already (in memory only).
        stream: decode for each batch, else now.
        augment: what "auto" means; None is by size.
        metric: what is reported of the set.

    Raises:
        RtkError: where an image cannot be decoded, a class is empty, or memory would not do.
    """
    _say_if_grey(name, parts["train"][0])
    for label, count in enumerate(torch.bincount(parts["train"][1], minlength=len(classes))):
        if not count:
            raise RtkError(
                f"{name}: class {label}, {classes[label]!r}, has no training image; add some, or "
                "choose classes in brackets behind the name"
            )
    height, width = side
    splits: dict[str, Split] = {}
    if not stream:
        check_memory(name, sum(len(files) for files, _ in parts.values()), height, width)
    for part, (files, labels) in parts.items():
        if stream:
            assert shorter is not None and height == width
            splits[part] = FileSplit(files, labels, width, shorter, config.workers)
        else:
            splits[part] = Split(decode(files, width, height, shorter), labels)
    if augment is None:
        augment = "resized_crop" if max(side) > LARGE else "crop"
    val = splits.get("val")
    return Dataset(name, tuple(classes), splits["train"], splits["test"], val, augment, metric)


def without_bad(name: str, parts: Parts) -> Parts:
    """Return the parts without the images that cannot be decoded, and warn of these.

    Raises RtkError where a part has none left.
    """
    bad: dict[str, str] = {}
    good = {}
    for part, (files, labels) in parts.items():
        found = undecodable(files)
        bad |= found
        keep = [i for i, file in enumerate(files) if file not in found]
        good[part] = ([files[i] for i in keep], labels[keep])
        if not keep:
            raise RtkError(f"{name}: no {part} image can be decoded; {next(iter(found.values()))}")
    if bad:
        total = sum(len(files) for files, _ in parts.values())
        shown = ", ".join(list(bad)[:8]) + (", ..." if len(bad) > 8 else "")
        warnings.warn(
            f"{name}: {len(bad)} of {total} images cannot be decoded and are left out "
            f"(data.skip_bad): {shown}",
            stacklevel=2,
        )
    return good


def _say_if_grey(name: str, files: list[str]) -> None:
    """Warn where the first images of a set are all grey: a network for colour is given them."""

    def mode(file: str) -> str:
        try:
            return open_image(file, lambda image: image.mode)
        except RtkError:
            return ""  # is complained about when it is decoded

    if all(mode in GREY_MODES for mode in map_threads(mode, files[:: max(1, len(files) // 8)])):
        warnings.warn(f"{name}: grey images are repeated to 3 channels", stacklevel=2)
