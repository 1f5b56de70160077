"""`rtk data get`: let torchvision download a named set; the only place that does."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import zipfile
from pathlib import Path

from rtk.config import DataConfig
from rtk.data.catalogue import CATALOGUE, Entry
from rtk.data.dataset import data_root
from rtk.errors import RtkError, check_choice

SUN_PARTITIONS = "https://vision.princeton.edu/projects/2010/SUN/download/Partitions.zip"
SUN_PARTITIONS_SHA256 = "e3311ea5f812d4cc6faef194688343d1111f6cd6f70f2c62f393c2b8d6ba1ec9"


def get(name: str, config: DataConfig) -> Path:
    """Fetch a named set into the data root, unless it is there, and return its folder.

    It is downloaded and unpacked in a folder `.NAME.part` beside, and moved when it is complete, so
    that what a broken download leaves is never taken for the set. Of ImageNet the archives, which
    must be there, are unpacked.

    Raises:
        RtkError: where the name is unknown, the set cannot be downloaded (with what to do by hand),
            the download fails, or something else lies where it belongs.
    """
    entry = CATALOGUE[check_choice("data set to get", name, CATALOGUE)]
    root = data_root(config)
    found = entry.found(root)
    if found is not None:
        return found / entry.folder
    if name == "imagenet":
        _unpack_imagenet(entry, config)
    elif entry.by_hand:
        raise entry.missing(config)
    else:
        _fetch(entry, root)
    found = entry.found(root)
    if found is None:
        raise RtkError(
            f"{name}: what was downloaded into {root} has no {entry.folder}; this torchvision lays "
            "it out in another way: report it, and unpack it by hand meanwhile"
        )
    return found / entry.folder


def _fetch(entry: Entry, root: Path) -> None:
    from torchvision import datasets

    part = root / f".{entry.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    print(f"{entry.name}: {entry.download} from {entry.source}", file=sys.stderr)
    pieces = [one for group in entry.parts.values() for one in group] or [{}]
    try:
        for arguments in pieces:
            getattr(datasets, entry.reader)(str(part), download=True, **arguments)
        if entry.name == "sun397":
            _fetch_partition(part / entry.folder)
    except Exception as error:  # urllib, http, tarfile, zipfile and torchvision raise many things
        shutil.rmtree(part, ignore_errors=True)
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RtkError(
            f"{entry.name} could not be downloaded ({reason}); try again later, or unpack it by "
            f"hand from {entry.source} so that {root / entry.folder} is there"
        ) from error
    for item in part.iterdir():
        _move(item, root / item.name)
    shutil.rmtree(part)


def _move(item: Path, to: Path) -> None:
    """Move a file or folder; a folder that is there (MNIST's, of another version) is added to."""
    if to.exists() and to.is_dir() != item.is_dir():
        raise RtkError(f"{to} is in the way of the downloaded {item}; remove it and try again")
    if to.is_dir():
        for inner in item.iterdir():
            _move(inner, to / inner.name)
    else:
        os.replace(item, to)


def _fetch_partition(folder: Path) -> None:
    """Put the lists of SUN397's first partition into its folder; torchvision leaves them out."""
    from torchvision.datasets.utils import download_url

    download_url(SUN_PARTITIONS, str(folder))
    archive = folder / "Partitions.zip"
    if hashlib.sha256(archive.read_bytes()).hexdigest() != SUN_PARTITIONS_SHA256:
        raise RuntimeError(f"the checksum of {SUN_PARTITIONS} differs")
    with zipfile.ZipFile(archive) as members:
        for member in members.namelist():
            name = member.rpartition("/")[2]
            if name in ("Training_01.txt", "Testing_01.txt"):
                (folder / name).write_bytes(members.read(member))
    archive.unlink()


def _unpack_imagenet(entry: Entry, config: DataConfig) -> None:
    from torchvision import datasets

    root = data_root(config) / "imagenet"
    if not root.is_dir():
        raise entry.missing(config)
    for split in ("train", "val"):
        try:
            datasets.ImageNet(str(root), split=split)
        except Exception as error:  # a missing or damaged archive, a full disk
            raise RtkError(
                f"imagenet could not be unpacked in {root} ({' '.join(str(error).split())}); "
                f"{entry.by_hand}; remove {root / split} if it is there"
            ) from error
