"""Image files: found, opened as anybody sees them, brought to squares, decoded by many threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from rtk.errors import RtkError

if TYPE_CHECKING:
    from PIL import Image

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
GREY_MODES = ("1", "L", "LA", "La")
# Pixels: larger images are trained on by random parts, smaller ones are shifted by a few pixels.
LARGE = 64
S = TypeVar("S")
T = TypeVar("T")


def class_folders(path: Path) -> list[str]:
    """Return the names of the folders in `path` but for hidden ones, sorted."""
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def list_images(path: Path, classes: Sequence[str]) -> tuple[list[str], Tensor]:
    """Return the image files below each class folder, sorted by path, and their labels.

    Raises RtkError where a class folder holds none.
    """
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        inside = [
            os.path.join(folder, file)
            for folder, _, names in os.walk(path / name, followlinks=True)
            for file in names
            if file.lower().endswith(EXTENSIONS) and not file.startswith(".")
        ]
        if not inside:
            raise RtkError(
                f"class folder {path / name} holds no image ({' '.join(EXTENSIONS)}); "
                "add some or remove the folder"
            )
        files += sorted(inside, key=lambda file: file.split(os.sep))
        labels += [label] * len(inside)
    return files, torch.tensor(labels)


def open_image(file: str, use: Callable[[Image.Image], T]) -> T:
    """Return `use(image)` of a file's image, not decoded yet.

    Raises RtkError, naming the file, where it cannot be decoded or has more than 8 bits a channel.
    """
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


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the image as a viewer shows it on white paper, in RGB.

    A camera's orientation is applied, transparent parts become white, grey is repeated, palettes
    and CMYK are converted. What has none of these is as torchvision reads it.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("RGB")


def to_square(image: Image.Image, shorter: int, size: int) -> Image.Image:
    """Resize the shorter side to `shorter`, crop the centre: torchvision's Resize, CenterCrop.

    Args:
        image: RGB.
        shorter: pixels of the shorter side before the crop, >= size.
        size: height and width of the result in pixels.
    """
    from PIL.Image import Resampling

    short = min(image.size)
    width, height = (
        shorter if side == short else int(shorter * side / short) for side in image.size
    )
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), Resampling.BILINEAR)
    return image.crop((left, top, left + size, top + size))


def shorter_side(size: int) -> int:
    """Return what the shorter side is resized to before a square of `size` pixels is cut out.

    Large images lose their margin, as 224 of 256 pixels, which is customary; small ones do not.
    """
    return round(size * 256 / 224) if size > LARGE else size


def map_threads(function: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """Map with a thread pool (PIL frees the GIL while it decodes); the first error stops it."""
    results: list[T] = []
    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    try:
        for start in range(0, len(items), 4096):  # a pending call costs a kilobyte
            results += pool.map(function, items[start : start + 4096])
    finally:
        pool.shutdown(cancel_futures=True)
    return results


def undecodable(files: Sequence[str]) -> dict[str, str]:
    """Decode every file and return those that fail, with what is wrong."""

    def reason(file: str) -> str | None:
        try:
            open_image(file, to_rgb)
        except RtkError as error:
            return str(error)
        return None

    found = zip(files, map_threads(reason, files), strict=True)
    return {file: text for file, text in found if text is not None}


def common_size(files: Sequence[str]) -> tuple[int, int]:
    """Return the (width, height) that all images have, from their headers.

    Raises RtkError, naming two files, where they differ.
    """

    def seen(image: Image.Image) -> tuple[int, int]:
        turned = image.getexif().get(0x0112, 1) >= 5  # orientations that swap the sides
        return (image.height, image.width) if turned else image.size

    sizes = map_threads(lambda file: open_image(file, seen), files)
    for file, size in zip(files, sizes, strict=True):
        if size != sizes[0]:
            raise RtkError(
                f"image sizes differ: {files[0]} is {sizes[0]} and {file} is {size} "
                "(width, height); set data.image_size"
            )
    return sizes[0]


def decode(files: Sequence[str], width: int, height: int, shorter: int | None) -> Tensor:
    """Return the images as (N, 3, height, width) uint8.

    Args:
        files: of the images.
        width: of the result, in pixels.
        height: of the result; the width, if `shorter` is given.
        shorter: see `to_square`; None for images that have the result's size already.
    """
    images = torch.empty(len(files), 3, height, width, dtype=torch.uint8)
    rows = images.numpy()

    def fill(row: int) -> None:
        def use(image: Image.Image) -> None:
            rgb = to_rgb(image)
            if shorter is not None:
                rgb = to_square(rgb, shorter, width)
            rows[row] = np.asarray(rgb).transpose(2, 0, 1)

        open_image(files[row], use)

    map_threads(fill, range(len(files)))
    return images
