"""The sets of the catalogue, read by torchvision or by their folders; never downloaded here."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rtk.config import DataConfig
from rtk.data.catalogue import CATALOGUE, Entry
from rtk.data.dataset import DATA_SETS, Dataset, Split, data_root
from rtk.data.files import Parts, from_files, without_bad
from rtk.data.folder import read_parts
from rtk.data.images import LARGE, class_folders, shorter_side
from rtk.errors import RtkError

_CALTECH_TRAIN = {"caltech101": 30, "caltech256": 60}  # images a class that train
_SUN_IMAGES = 50  # images a class that train, and as many that test, in a partition


def _load(name: str, path: str, config: DataConfig) -> Dataset:
    """Return the named set; see its entry in the catalogue.

    Raises RtkError where it is missing (with the paths tried and how to get it), its files are not
    what torchvision expects, an image cannot be decoded or memory would not do.
    """
    entry = CATALOGUE[name]
    base = entry.found(data_root(config))
    if base is None:
        raise entry.missing(config)
    if entry.image_size is None:
        return _arrays(entry, base)
    classes, parts = _FILES.get(name, _by_torchvision)(entry, base)
    if config.skip_bad:
        parts = without_bad(name, parts)
    size = config.image_size or entry.image_size
    stream = config.storage == "stream" or (config.storage == "auto" and size > LARGE)
    return from_files(
        name,
        classes,
        parts,
        config,
        side=(size, size),
        shorter=shorter_side(size),
        stream=stream,
        augment=entry.augment,
        metric=entry.metric,
    )


@contextmanager
def _explained(entry: Entry, base: Path) -> Iterator[None]:
    """Turn whatever a reader raises on files that are not as it expects them into an RtkError."""
    try:
        yield
    except RtkError:
        raise
    except Exception as error:  # torchvision, scipy, json and csv raise many things
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        expected = f"; expected {entry.layout}" if entry.layout else ""
        again = "get it again" if entry.by_hand else f"remove it and `rtk data get {entry.name}`"
        raise RtkError(
            f"{entry.name}: the files in {base / entry.folder} are incomplete, damaged or of "
            f"another layout ({reason}){expected}; {again}"
        ) from error


def _readers(entry: Entry, base: Path, **options: Any) -> Iterator[tuple[str, Any]]:
    """Yield each piece of each part, as torchvision reads it."""
    from torchvision import datasets

    reader = getattr(datasets, entry.reader)
    for part, pieces in entry.parts.items():
        for arguments in pieces:
            with _explained(entry, base):
                read = reader(str(base), download=False, **arguments, **options)
            yield part, read


def _arrays(entry: Entry, base: Path) -> Dataset:
    """Return a set that torchvision holds in memory as arrays."""
    splits: dict[str, Split] = {}
    for part, read in _readers(entry, base):
        images = torch.as_tensor(read.data)
        if images.ndim == 3:
            images = images[:, None].expand(-1, 3, -1, -1)
            if part == "train":
                warnings.warn(f"{entry.name}: grey images are repeated to 3 channels", stacklevel=2)
        labels = read.targets if hasattr(read, "targets") else read.labels
        splits[part] = Split(images.contiguous(), torch.as_tensor(labels).long())
    classes = getattr(read, "classes", None) or map(str, range(entry.classes))
    augment = entry.augment or "crop"
    train, test = splits["train"], splits["test"]
    return Dataset(entry.name, tuple(classes), train, test, None, augment, entry.metric)


def _samples(read: Any) -> tuple[list[str], list[int]]:
    """Return the files and labels of one of torchvision's sets, without opening an image."""
    if hasattr(read, "loader"):  # made to return the path (below)
        pairs = [read[i] for i in range(len(read))]
    elif hasattr(read, "_samples"):
        pairs = read._samples
    else:
        pairs = list(zip(read._images, read._labels, strict=True))
    return [str(file) for file, _ in pairs], [int(label) for _, label in pairs]


def _by_torchvision(entry: Entry, base: Path) -> tuple[list[str], Parts]:
    parts: dict[str, tuple[list[str], list[int]]] = {"train": ([], []), "test": ([], [])}
    classes: list[str] | None = None
    options = {} if entry.reader in ("OxfordIIITPet", "GTSRB") else {"loader": str}
    for part, read in _readers(entry, base, **options):
        files, labels = _samples(read)
        parts[part][0].extend(files)
        parts[part][1].extend(labels)
        own = list(getattr(read, "classes", []))
        classes = own if classes is None else classes
        if own != classes:  # torchvision numbers the classes of each list by themselves
            differ = ", ".join(sorted(set(own) ^ set(classes))[:8])
            raise RtkError(
                f"{entry.name}: the lists of images in {base / entry.folder} do not have the same "
                f"classes ({differ} is not in all of them); get it again"
            )
    found = {part: (files, torch.tensor(labels)) for part, (files, labels) in parts.items()}
    highest = max(max(labels) for _, labels in parts.values() if labels)
    return classes or [str(i) for i in range(highest + 1)], found


def _digest_order(names: list[str]) -> list[str]:
    """Return the names in the order of their SHA-256: a shuffle that no library can change."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def _drawn(
    root: Path, inside: dict[str, list[str]], train: int, test: int | None, name: str
) -> Parts:
    """Return for each class `train` images, and `test` others (None: all others).

    Args:
        root: of the class folders.
        inside: the images of each class, as paths below the root.
        train: number of training images a class.
        test: number of test images a class.
        name: for the message.
    """
    parts: dict[str, tuple[list[str], list[int]]] = {"train": ([], []), "test": ([], [])}
    for label, (class_name, files) in enumerate(inside.items()):
        if len(files) <= train:
            raise RtkError(
                f"{name}: class {class_name!r} in {root} has {len(files)} images, of which {train} "
                "train and the rest tests; the files are incomplete: get the set again"
            )
        order = _digest_order(files)
        end = None if test is None else train + test
        for part, chosen in (("train", order[:train]), ("test", order[train:end])):
            parts[part][0].extend(str(root / file) for file in sorted(chosen))
            parts[part][1].extend([label] * len(chosen))
    return {part: (files, torch.tensor(labels)) for part, (files, labels) in parts.items()}


def _caltech(entry: Entry, base: Path) -> tuple[list[str], Parts]:
    """Draw 30 (or 60) images a class for training: there is no official split.

    Caltech-101's background is no class; Caltech-256's clutter is one, as in Kornblith et al.
    """
    root = base / entry.folder
    classes = [name for name in class_folders(root) if name != "BACKGROUND_Google"]
    if not classes:
        raise RtkError(f"{root} holds no class folder; expected {entry.layout}")
    inside = {
        name: [f"{name}/{file.name}" for file in (root / name).glob("*.jpg")] for name in classes
    }
    return classes, _drawn(root, inside, _CALTECH_TRAIN[entry.name], None, entry.name)


def _sun397(entry: Entry, base: Path) -> tuple[list[str], Parts]:
    """Read the first official partition, or, where its lists are missing, draw one like it."""
    root = base / entry.folder
    with _explained(entry, base):
        lines = (root / "ClassName.txt").read_text().splitlines()
        classes = [line.strip().removeprefix("/") for line in lines if line.strip()]
    lists = {"train": "Training_01.txt", "test": "Testing_01.txt"}
    folders = (root, base, base / "Partitions")
    places = [place for place in folders if (place / lists["train"]).exists()]
    if not places:
        warnings.warn(
            f"{entry.name}: no {lists['train']} in {root}: {_SUN_IMAGES} images a class are drawn "
            f"to train and {_SUN_IMAGES} to test, so numbers are not of the published partition; "
            "Partitions.zip of the set's page has it",
            stacklevel=2,
        )
        inside = {
            name: [str(file.relative_to(root)) for file in (root / name).glob("sun_*.jpg")]
            for name in classes
        }
        return classes, _drawn(root, inside, _SUN_IMAGES, _SUN_IMAGES, entry.name)
    number = {name: label for label, name in enumerate(classes)}
    parts: Parts = {}
    for part, list_name in lists.items():
        with _explained(entry, base):
            text = (places[0] / list_name).read_text()
            names = [line.strip().removeprefix("/") for line in text.splitlines() if line.strip()]
            labels = torch.tensor([number[name.rpartition("/")[0]] for name in names])
        parts[part] = ([str(root / name) for name in names], labels)
    return classes, parts


def _trees(entry: Entry, base: Path, *, test: str) -> tuple[list[str], Parts]:
    root = (base / entry.folder).parent
    return read_parts({"train": root / "train", "test": root / test})


_FILES: dict[str, Callable[[Entry, Path], tuple[list[str], Parts]]] = {
    "caltech101": _caltech,
    "caltech256": _caltech,
    "sun397": _sun397,
    "birdsnap": partial(_trees, test="test"),
    "imagenet": partial(_trees, test="val"),
}

for _name, _entry in CATALOGUE.items():
    if not _entry.segmentation and _name not in ("cifar10", "cifar100"):  # rtk/data/cifar.py
        DATA_SETS.register(_name)(partial(_load, _name))
