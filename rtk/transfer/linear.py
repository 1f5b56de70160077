"""Linear evaluation: the ticket's weights are fixed, a new classifier learns on its features."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rtk import data
from rtk.models import Classifier
from rtk.train import train
from rtk.transfer.task import Task


def linear_bn_update(model: Classifier, task: Task, **loop: Any) -> None:
    """Train the head on augmented images with batch norm in train mode.

    Batch norm uses and keeps the new task's statistics; its scale and shift are fixed, as all
    other weights (Salman et al. 2020).
    """
    _freeze_all_but_head(model)
    train(model, task.train_batches(), task.config, **loop)


def linear_frozen(model: Classifier, task: Task, **loop: Any) -> None:
    """Train the head on features that the network gives in eval mode, computed once.

    Images are not augmented: each has one feature vector (Iofinova et al. 2022).
    """
    _freeze_all_but_head(model)
    images = data.Batches(task.dataset.train, **task.batches)
    features = FeatureBatches(model, images, seed=task.batches["seed"])
    head = model.get_submodule(model.head_name)
    train(model, features, task.config, network=head, set_mode=nn.Module.eval, **loop)


def _freeze_all_but_head(model: Classifier) -> None:
    model.requires_grad_(False)
    model.get_submodule(model.head_name).requires_grad_(True)


class FeatureBatches:
    """Shuffled batches of feature vectors, with the interface of `rtk.data.Batches`.

    The order is a function of (seed, epoch), so that a stopped run goes on bit for bit.
    """

    def __init__(self, model: Classifier, images: data.Batches, *, seed: int) -> None:
        model.eval()
        with torch.no_grad():
            pairs = [(model.forward_features(x), y) for x, y in images.epoch(0)]
        self.features = torch.cat([x for x, _ in pairs])
        self.labels = torch.cat([y for _, y in pairs])
        self.batch_size = images.batch_size
        self.seed = seed

    def __len__(self) -> int:
        return max(1, len(self.labels) // self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (B, F) features and (B,) labels of an epoch from step `start` on."""
        order = data.epoch_order(len(self.labels), self.seed, epoch).to(self.labels.device)
        for step in range(start, len(self)):
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield self.features[chosen], self.labels[chosen]
