"""Whole-model finetuning: every weight that the ticket keeps is trained on the new task."""

from __future__ import annotations

from typing import Any

from rtk.models import Classifier
from rtk.train import train
from rtk.transfer.task import Task


def finetune(model: Classifier, task: Task, **loop: Any) -> None:
    """Train all parameters of `model` (its head is new) on the task's images.

    Pruned weights stay exactly 0: their gradient is 0, and weight decay has nothing to act on.
    """
    train(model, task.train_batches(), task.config, **loop)
