"""folder:PATH: an ImageFolder tree, decoded once and kept in memory as uint8."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from rtk.config import DataConfig
from rtk.data.dataset import (
    DATA_SETS,
    Dataset,
    Split,
    candidate_paths,
    check_memory,
    every_fifth,
)
from rtk.errors import RtkError

if TYPE_CHECKING:
    from PIL import Image

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
T = TypeVar("T")


def _class_folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _list_images(path: Path, classes: list[str]) -> tuple[list[Path], torch.Tensor]:
    """Return the image files below each class folder, sorted by path, and their labels."""
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        inside = [
            Path(folder) / file
            for folder, _, names in os.walk(path / name, followlinks=True)
            for file in names
            if file.lower().endswith(EXTENSIONS) and not file.startswith(".")
        ]
        if not inside:
            raise RtkError(
                f"class folder {path / name} holds no image ({' '.join(EXTENSIONS)}); "
                "add some or remove the folder"
            )
        files += sorted(inside)
        labels += [label] * len(inside)
    return files, torch.tensor(labels)


def _open(file: Path, use: Callable[[Image.Image], T]) -> T:
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"mode {image.mode}: more than 8 bits a channel")
            return use(image)
    except Exception as error:  # PIL's many decoders raise nearly anything on a damaged file
        raise RtkError(
            f"{file} cannot be decoded ({error}); replace it by an 8-bit image or remove it"
        ) from error


def _to_square(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to `size` and crop the centre, as torchvision's transforms do."""
    from PIL.Image import Resampling

    short = min(image.size)
    width, height = (size if side == short else int(size * side / short) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), Resampling.BILINEAR)
    return image.crop((left, top, left + size, top + size))


def _map(function: Callable[[Path], T], files: list[Path]) -> list[T]:
    """Map with a thread pool (PIL frees the GIL while it decodes); the first error stops it."""
    results: list[T] = []
    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    try:
        for start in range(0, len(files), 4096):  # a pending call costs a kilobyte
            results += pool.map(function, files[start : start + 4096])
    finally:
        pool.shutdown(cancel_futures=True)
    return results


def _common_size(files: list[Path]) -> tuple[int, int]:
    """Return the (width, height) that all images have, from their headers."""
    sizes = _map(lambda file: _open(file, lambda image: image.size), files)
    for file, size in zip(files, sizes, strict=True):
        if size != sizes[0]:
            raise RtkError(
                f"image sizes differ: {files[0]} is {sizes[0]} and {file} is {size} "
                "(width, height); set data.image_size"
            )
    return sizes[0]


def _decode(files: list[Path], width: int, height: int, *, resize: bool) -> torch.Tensor:
    """Return the images as (N, 3, height, width) uint8."""
    images = torch.empty(len(files), 3, height, width, dtype=torch.uint8)
    row = dict(zip(files, images.numpy(), strict=True))

    def fill(file: Path) -> None:
        def use(image: Image.Image) -> None:
            rgb = image.convert("RGB")
            row[file][:] = np.asarray(_to_square(rgb, width) if resize else rgb).transpose(2, 0, 1)

        _open(file, use)

    _map(fill, files)
    return images


@DATA_SETS.register("folder")
def folder(path: str, config: DataConfig) -> Dataset:
    """Return the images of an ImageFolder tree, `PATH/train/<class>/*` and `PATH/test` or `val`.

    With both test and val, val validates; with val alone, val tests. With none of these, or
    train alone, the 5th, 10th, ... image of each class (sorted by path) tests. With
    data.image_size the shorter side is resized to it and the centre is cropped; without, all
    images must have one size. A relative path is tried as given and under the data root.
    Raises RtkError where there is no tree, an image cannot be decoded, class folders disagree or
    the images need more than 16 GiB.
    """
    tried = candidate_paths(path, config)
    root = next((candidate for candidate in tried if candidate.is_dir()), None)
    if root is None:
        raise RtkError(
            f"no folder for folder:{path}; tried {' and '.join(map(str, tried))}; "
            "give a folder that holds train/<class>/ and test/<class>/, or <class>/"
        )
    parts = {part: root / part for part in ("train", "test", "val") if (root / part).is_dir()}
    if parts and "train" not in parts:
        raise RtkError(
            f"{root} holds {' and '.join(parts)} but no train folder; add train/<class>/"
        )
    if "val" in parts and "test" not in parts:
        parts["test"] = parts.pop("val")
    base = parts.get("train", root)
    classes = _class_folders(base)
    if not classes:
        raise RtkError(f"{base} holds no class folder; expected {base}/<class>/<image>")
    listed = {
        part: (place, _class_folders(place)) for part, place in (parts or {"all": root}).items()
    }
    for place, names in listed.values():
        if names != classes:
            differ = ", ".join(sorted(set(names) ^ set(classes))[:8])
            raise RtkError(
                f"class folders of {base} and {place} do not agree ({differ} is in one only); "
                "give both the same classes"
            )
    found = {part: _list_images(place, classes) for part, (place, _) in listed.items()}
    everything = [file for files, _ in found.values() for file in files]
    size = config.image_size
    width, height = (size, size) if size else _common_size(everything)
    check_memory(f"folder:{root}", len(everything), height, width)
    splits = {
        part: Split(_decode(files, width, height, resize=size is not None), labels)
        for part, (files, labels) in found.items()
    }
    if "test" not in splits:
        (whole,) = splits.values()
        test = every_fifth(whole.labels)
        if not test.any():
            raise RtkError(f"{root}: no class has 5 images to take a test image from; add test/")
        splits = {
            "train": Split(whole.images[~test], whole.labels[~test]),
            "test": Split(whole.images[test], whole.labels[test]),
        }
    augment = "resized_crop" if max(splits["train"].images.shape[2:]) > 64 else "crop"
    return Dataset(
        f"folder:{root}",
        tuple(classes),
        splits["train"],
        splits["test"],
        splits.get("val"),
        augment,
    )
