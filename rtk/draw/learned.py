"""The stage's side of LMP: from a configuration and a checkpoint to a learned ticket."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from rtk import data, models
from rtk.config import DrawConfig
from rtk.draw.lmp import lmp
from rtk.identity import config_hash, to_dict
from rtk.ticket import Ticket
from rtk.train import Checkpoint, accuracy, resolve_arithmetic


def draw(model: nn.Module, config: DrawConfig) -> Ticket:
    """Learn a mask over the weights of `config.checkpoint` on `config.data`, under a new head.

    Checkpoints and log go into the run's folder. The last checkpoint is the network that was
    learned: frozen weights under the mask, head and batch norm statistics; `rtk evaluate` takes it.

    Args:
        model: the checkpoint's network, on its device; it gets the head.

    Raises:
        RtkError: for bad settings or data, or a loss that becomes NaN.
    """
    assert isinstance(model, models.Classifier)
    checkpoint = Checkpoint.load(config.checkpoint)  # for what it says of itself
    device = next(model.parameters()).device
    dataset = data.load(config.data)
    models.replace_head(
        model, len(dataset.classes), generator=torch.Generator().manual_seed(config.seed)
    )
    model.to(device)
    channels_last, _ = resolve_arithmetic(config.train, device)
    size = config.train.batch_size
    batches = data.Batches(
        dataset.train,
        size,
        augment=dataset.augment if config.data.augment == "auto" else config.data.augment,
        shuffle=True,
        drop_last=True,  # one shape: all steps are of one CUDA graph
        seed=config.seed,
        device=device,
        channels_last=channels_last,
    )
    test = data.Batches(dataset.test, size, device=device)
    assert config.sparsity is not None and config.scope is not None
    ticket = lmp(
        model,
        batches,
        config.sparsity,
        config.granularity,
        config.scope,
        config=config.train,
        score_init=config.score_init,
        include_first=config.include_first,
        seed=config.seed,
        folder=config.out,
        meta={
            "stage": "draw",
            "config": to_dict(config),
            "config_hash": config_hash(config),
            "classes": list(dataset.classes),
            "source_sha256": checkpoint.sha256,
            "lineage": {
                **checkpoint.lineage,
                "target": config.data.name,
                "transfer": "lmp",
                "seed": config.seed,
            },
        },
        evaluate=lambda network: {"top1": accuracy(network, test).top1},
        resume=config.resume,
        save_scores=config.save_scores,
    )
    # A ticket learned on one task may be transferred to another: its lineage keeps the first.
    return dataclasses.replace(
        ticket, meta={**ticket.meta, "lineage": {"drawn_on": config.data.name}}
    )
