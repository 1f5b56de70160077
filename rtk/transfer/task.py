"""What a way of transferring is given: the new task's images and how to train on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rtk.config import TrainConfig
from rtk.data import Batches, Dataset


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

    def train_batches(self) -> Batches:
        """Return the shuffled, augmented training images: all of them in each epoch.

        Only a last batch of a single image is left out: batch norm cannot train on one.
        """
        alone = len(self.dataset.train) % self.batches["batch_size"] == 1
        return Batches(
            self.dataset.train,
            augment=self.augment,
            shuffle=True,
            drop_last=alone,
            **self.batches,
        )
