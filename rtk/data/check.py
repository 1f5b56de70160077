"""`rtk data list` and `rtk data check`: what is there, and whether every image of it is whole."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rtk.config import DataConfig
from rtk.data.catalogue import CATALOGUE
from rtk.data.dataset import Dataset, Split, data_root
from rtk.data.files import FileSplit
from rtk.data.images import GREY_MODES, map_threads, open_image, to_rgb
from rtk.data.resolve import load
from rtk.errors import RtkError

BUILT_IN = ("digits", "gaussian-noise", "uniform-noise")
_SHOWN = 20  # of a list in a message


def list_sets(config: DataConfig) -> str:
    """Return a table of all sets with names: whether they are there, and how to get them."""
    root = data_root(config)
    head = ("name", "state", "classes", "train", "test", "pixels", "metric", "size", "licence")
    rows = [(*head, "where or how")]
    for entry in CATALOGUE.values():
        found = entry.found(root)
        get = "by hand: rtk data get tells" if entry.by_hand else f"rtk data get {entry.name}"
        rows.append(
            (
                entry.name,
                "missing" if found is None else "ready",
                str(entry.classes),
                "varies" if entry.train is None else f"{entry.train:,}",
                "varies" if entry.test is None else f"{entry.test:,}",
                "as they are" if entry.image_size is None else str(entry.image_size),
                entry.metric,
                entry.download or "?",
                entry.licence,
                get if found is None else str(found / entry.folder),
            )
        )
    for name in BUILT_IN:
        rows.append((name, "ready", *"-------", "built in"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(
        [f"data root: {root}", *lines, "your own images: npz:PATH (arrays), folder:PATH (a tree)"]
    )


@dataclass(frozen=True)
class Check:
    """What `check` found.

    Args:
        text: the counts, for people.
        problems: what is wrong, each with what to do; none where the set is whole.
    """

    text: str
    problems: tuple[str, ...]


def check(config: DataConfig, *, duplicates: bool = False) -> Check:
    """Read every image of a set and say what is there and what is wrong.

    Args:
        config: the set; images that cannot be decoded are named, whatever `skip_bad` says.
        duplicates: look for images that are in both train and test (same bytes or same pixels).

    Raises:
        RtkError: where the set cannot be loaded at all.
    """
    entry = CATALOGUE.get(config.name)
    dataset = load(_as_files(config))
    lines = [f"{config.name}: {len(dataset.classes)} classes, reported as {dataset.metric}"]
    problems: list[str] = []
    seen: dict[str, list[tuple[str, str]]] = {}
    for part, split in dataset.splits().items():
        shapes, grey, bad, digests = _look(split, hashed=duplicates)
        lines.append(f"  {part:5} {len(split):,} images, {_balance(dataset, split)}")
        if shapes:
            least, *_, most = sorted(2 * list(shapes), key=lambda size: size[0] * size[1])
            sizes = _pixels(least) if len(shapes) == 1 else f"{_pixels(least)} to {_pixels(most)}"
            lines.append(f"        {sizes} pixels (width x height), {grey:,} grey")
        if bad:
            shown = "\n  ".join(list(bad)[:_SHOWN]) + ("\n  ..." if len(bad) > _SHOWN else "")
            problems.append(
                f"{len(bad)} of {len(split)} {part} images cannot be decoded (data.skip_bad true "
                f"leaves them out):\n  {shown}"
            )
        expected = None if entry is None else getattr(entry, part, None)
        if expected not in (None, len(split)):
            problems.append(f"{part} has {len(split):,} images where the set has {expected:,}")
        seen[part] = digests
    if entry is not None and len(dataset.classes) != entry.classes:
        problems.append(f"{len(dataset.classes)} classes where the set has {entry.classes}")
    if duplicates:
        trained = {digest for digest, _ in seen["train"]}
        both = [name for digest, name in seen["test"] if digest in trained]
        lines.append(f"  {len(both):,} test images are also in train")
        lines += [f"        {name}" for name in both[:_SHOWN]]
    return Check("\n".join(lines), tuple(problems))


def _as_files(config: DataConfig) -> DataConfig:
    """Return the setting that leaves images in their files where they are in files at all."""
    kind = config.name.partition(":")[0].partition("[")[0]
    entry = CATALOGUE.get(kind)
    if kind != "folder" and (entry is None or entry.image_size is None):
        return replace(config, skip_bad=False)
    return replace(config, storage="stream", image_size=config.image_size or 224, skip_bad=False)


def _look(
    split: Split, *, hashed: bool
) -> tuple[set[tuple[int, int]], int, list[str], list[tuple[str, str]]]:
    """Return sizes (width, height), how many are grey, what is bad, and digests with names."""
    if not isinstance(split, FileSplit):
        height, width = split.size
        same = split.images[:, 0] == split.images[:, 1]
        grey = int((same & (split.images[:, 1] == split.images[:, 2])).flatten(1).all(1).sum())
        images = split.images.numpy() if hashed else ()
        digests = [
            (hashlib.sha256(x.tobytes()).hexdigest(), f"image {i}") for i, x in enumerate(images)
        ]
        return {(width, height)}, grey, [], digests

    def read(file: str) -> tuple[tuple[int, int], bool] | str:
        try:
            return open_image(file, lambda image: (to_rgb(image).size, image.mode in GREY_MODES))
        except RtkError as error:
            return str(error)

    results = map_threads(read, split.files)
    whole = [result for result in results if not isinstance(result, str)]
    there = [file for file in split.files if Path(file).is_file()] if hashed else []
    sums = map_threads(lambda file: hashlib.sha256(Path(file).read_bytes()).hexdigest(), there)
    return (
        {size for size, _ in whole},
        sum(grey for _, grey in whole),
        [result for result in results if isinstance(result, str)],
        list(zip(sums, there, strict=True)),
    )


def _balance(dataset: Dataset, split: Split) -> str:
    counts = torch.bincount(split.labels, minlength=len(dataset.classes))
    low, high = int(counts.min()), int(counts.max())
    if low == high:
        return f"{low:,} a class"
    least = dataset.classes[int(counts.argmin())]
    return f"{low:,} ({least}) to {high:,} a class, median {int(counts.median()):,}"


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
