"""What a way of transferring is given: the new task's images and how to train on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rtk.config import TrainConfig
from rtk.data import Dataset


@dataclass(frozen=True)
class Task:
    """A downstream task.

    Args:
        dataset: its images.
        augment: the augmentation for training images.
        config: how to train.
        batches: the arguments that all batches share: batch_size, seed, device, ...
    """

    dataset: Dataset
    augment: str
    config: TrainConfig
    batches: dict[str, Any]
