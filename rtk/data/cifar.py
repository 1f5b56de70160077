"""cifar10 and cifar100, read by torchvision from the official archives; never downloaded here."""

from __future__ import annotations

from typing import Any

import torch

from rtk.config import DataConfig
from rtk.data.dataset import DATA_SETS, Dataset, Split, data_root
from rtk.errors import RtkError


def _load(name: str, reader: Any, config: DataConfig) -> Dataset:
    root = data_root(config)
    tried = [root / reader.base_folder, root / name / reader.base_folder]
    found = next((path for path in tried if path.is_dir()), None)
    archive = reader.url.rsplit("/", 1)[-1]
    if found is None:
        raise RtkError(
            f"{name} is not there; tried {' and '.join(map(str, tried))}. Download it with "
            f"`rtk data get {name}` or --download, or by hand with\n"
            f"  mkdir -p {root} && curl -L {reader.url} | tar -xz -C {root}\n"
            "or name the folder that holds it with --data.root or RTK_DATA"
        )
    splits = []
    for train in (True, False):
        try:
            part = reader(root=str(found.parent), train=train, download=False)
        except (RuntimeError, OSError) as error:
            raise RtkError(
                f"{name}: the files in {found} are incomplete or corrupted (checksum); "
                f"remove them and unpack {archive} from {reader.url} into {found.parent} again"
            ) from error
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        splits.append(Split(images, torch.tensor(part.targets)))
    return Dataset(name, tuple(part.classes), splits[0], splits[1], val=None, augment="crop")


@DATA_SETS.register("cifar10")
def cifar10(path: str, config: DataConfig) -> Dataset:
    """Return CIFAR-10: 50,000 / 10,000 images of 32x32 pixels.

    Raises RtkError where it is missing (with the paths tried and the command to get it) or
    fails torchvision's checksums. Source: https://www.cs.toronto.edu/~kriz/cifar.html
    """
    from torchvision import datasets

    return _load("cifar10", datasets.CIFAR10, config)


@DATA_SETS.register("cifar100")
def cifar100(path: str, config: DataConfig) -> Dataset:
    """Return CIFAR-100 with its 100 fine labels; the rest as `cifar10`."""
    from torchvision import datasets

    return _load("cifar100", datasets.CIFAR100, config)
