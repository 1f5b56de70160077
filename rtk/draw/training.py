"""What the schemes that train make of a configuration: images, a head, a folder, a record."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rtk import data, models
from rtk.config import DataConfig, DrawConfig
from rtk.errors import RtkError
from rtk.identity import config_hash, to_dict
from rtk.train import accuracy, check_batch_size, resolve_arithmetic

Evaluate = Callable[[nn.Module], dict[str, float]]


def load_images(
    images: DataConfig, config: DrawConfig, device: torch.device
) -> tuple[data.Dataset, data.Batches, Evaluate]:
    """Return a set, its training images, and the function that looks at its test images."""
    check_batch_size(config.train.batch_size)
    dataset = data.load(images)
    channels_last, _ = resolve_arithmetic(config.train, device)
    size = config.train.batch_size
    batches = data.Batches(
        dataset.train,
        size,
        augment=dataset.augment if images.augment == "auto" else images.augment,
        shuffle=True,
        drop_last=True,  # one shape: all steps are of one CUDA graph
        seed=config.seed,
        device=device,
        channels_last=channels_last,
    )
    test = data.Batches(dataset.test, size, device=device)
    return dataset, batches, lambda network: {"top1": accuracy(network, test).top1}


def classifier(model: nn.Module, scheme: str) -> models.Classifier:
    """Return `model`, or raise an RtkError where it is not a network that classifies."""
    if not isinstance(model, models.Classifier):
        raise RtkError(
            f"{scheme} trains networks that classify, the checkpoint holds a "
            f"{type(model).__name__}; draw from the pretrained network, or by omp"
        )
    return model


def give_head(model: models.Classifier, dataset: data.Dataset, config: DrawConfig) -> None:
    """Put a new head for the images on `model`, in place: a function of the seed."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(config.seed)
    models.replace_head(model, len(dataset.classes), generator=generator)
    model.to(device)


def record(config: DrawConfig, source_sha256: str) -> dict[str, Any]:
    """Return what every file of a draw says of the run that made it."""
    return {
        "source_sha256": source_sha256,
        "config": to_dict(config),
        "config_hash": config_hash(config),
    }


@contextlib.contextmanager
def working_folder(folder: str | Path | None) -> Iterator[Path]:
    """Give the folder, made if need be, or one that is gone afterwards."""
    if folder is not None:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)
