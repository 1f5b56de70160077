"""The stage's side of IMP and A-IMP: from a configuration and a checkpoint to the last ticket."""

from __future__ import annotations

import warnings
from pathlib import Path

from torch import nn

from rtk import attacks
from rtk.config import DrawConfig
from rtk.data import Dataset
from rtk.draw.imp import check_drawable, imp
from rtk.draw.training import classifier, give_head, load_images, record
from rtk.errors import RtkError
from rtk.identity import claim_folder
from rtk.ticket import TICKET, Ticket
from rtk.train import Checkpoint


def draw(model: nn.Module, config: DrawConfig) -> Ticket:
    """Prune the network of `config.checkpoint` round by round, upstream or downstream.

    The tickets of all rounds, and their logs, are in the run's folder, under rounds.

    Args:
        model: the checkpoint's network, on its device; downstream it gets a new head.

    Raises:
        RtkError: for bad settings or data, a head that does not fit upstream, or a loss that
            becomes NaN.
    """
    model = classifier(model, config.scheme)
    assert config.sparsity is not None and config.scope is not None
    assert config.task is not None and config.rate is not None
    assert config.include_first is not None
    checkpoint = Checkpoint.load(config.checkpoint)  # for what it says of itself
    upstream = config.task == "upstream"
    images = checkpoint.images(config.data) if upstream else config.data
    device = next(model.parameters()).device
    dataset, batches, evaluate = load_images(images, config, device)
    if upstream:
        _check_head(checkpoint, dataset)
    else:
        if images.name == checkpoint.lineage.get("source"):
            warnings.warn(
                f"{images.name} is what the network was pretrained on, and it gets a new head for "
                "it; --task upstream keeps its own",
                stacklevel=2,
            )
        give_head(model, dataset, config)
    attack = attacks.create(config.attack)
    check_drawable(model, config.sparsity, config.granularity, config.scope, config.include_first)
    claim_folder(config)
    if not config.resume:
        # Before the rounds go: were this killed between, the ticket would stand without them.
        (Path(config.out) / TICKET).unlink(missing_ok=True)
    return imp(
        model,
        batches,
        config.sparsity,
        config.granularity,
        config.scope,
        rounds=config.rounds,
        rate=config.rate,
        task=config.task,
        attack=attack,
        config=config.train,
        include_first=config.include_first,
        seed=config.seed,
        folder=config.out,
        meta={
            **record(config, checkpoint.sha256),
            "lineage": {"drawn_on": images.name, "draw_attack": config.attack.label},
        },
        evaluate=evaluate,
        resume=config.resume,
    )


def _check_head(checkpoint: Checkpoint, dataset: Dataset) -> None:
    """Look whether the head that upstream keeps is one for these images."""
    theirs, ours = checkpoint.spec.num_classes, list(dataset.classes)
    if theirs != len(ours):
        raise RtkError(
            f"imp upstream keeps the network's head of {theirs} classes, {dataset.name} has "
            f"{len(ours)}; give the images of the pretraining, or take --task downstream"
        )
    known = checkpoint.meta.get("classes", ours)
    if known != ours:
        warnings.warn(
            f"the network was trained on the classes {', '.join(known)}; {dataset.name} has "
            f"{', '.join(ours)}",
            stacklevel=3,
        )
