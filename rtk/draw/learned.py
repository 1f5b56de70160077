"""The stage's side of LMP: from a configuration and a checkpoint to a learned ticket."""

from __future__ import annotations

import dataclasses

from torch import nn

from rtk.config import DrawConfig
from rtk.draw.lmp import lmp
from rtk.draw.training import classifier, give_head, load_images, record
from rtk.identity import claim_folder
from rtk.ticket import Ticket
from rtk.train import Checkpoint


def draw(model: nn.Module, config: DrawConfig) -> Ticket:
    """Learn a mask over the weights of `config.checkpoint` on `config.data`, under a new head.

    Checkpoints and log go into the run's folder. The last checkpoint is the network that was
    learned: frozen weights under the mask, head and batch norm statistics; `rtk evaluate` takes it.

    Args:
        model: the checkpoint's network, on its device; it gets the head.

    Raises:
        RtkError: for bad settings or data, or a loss that becomes NaN.
    """
    model = classifier(model, config.scheme)
    checkpoint = Checkpoint.load(config.checkpoint)  # for what it says of itself
    device = next(model.parameters()).device
    dataset, batches, evaluate = load_images(config.data, config, device)
    give_head(model, dataset, config)
    assert config.sparsity is not None and config.scope is not None
    assert config.include_first is not None
    claim_folder(config)
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
            **record(config, checkpoint.sha256),
            "classes": list(dataset.classes),
            "lineage": {
                **checkpoint.lineage,
                "target": config.data.name,
                "transfer": "lmp",
                "seed": config.seed,
            },
        },
        evaluate=evaluate,
        resume=config.resume,
        save_scores=config.save_scores,
    )
    # A ticket learned on one task may be transferred to another: its lineage keeps the first.
    return dataclasses.replace(
        ticket, meta={**ticket.meta, "lineage": {"drawn_on": config.data.name}}
    )
