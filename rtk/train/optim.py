"""The optimiser and its schedule, made from a TrainConfig."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from rtk.config import TrainConfig


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.SGD:
    """Return SGD over the parameters that require grad."""
    return torch.optim.SGD(
        [p for p in parameters if p.requires_grad],
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )


def learning_rate(config: TrainConfig, epoch: float) -> float:
    """Return the rate at `epoch` (fractional inside an epoch): a pure function, nothing to save.

    Multistep changes at whole epochs, cosine falls to 0 at the last one; a linear warm-up from 0
    scales either.
    """
    rate = config.lr
    if config.schedule == "multistep":
        rate *= config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
    elif config.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * min(1.0, epoch / max(1, config.epochs))))
    if epoch < config.warmup_epochs:
        rate *= epoch / config.warmup_epochs
    return rate


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
