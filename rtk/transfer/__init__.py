"""Transfer: a ticket, with the weights it was drawn from, to a downstream task."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from rtk import data, models
from rtk.config import TransferConfig
from rtk.identity import claim_folder, config_hash, to_dict
from rtk.registry import Registry
from rtk.runs import find_artefact
from rtk.ticket import TICKET, Ticket
from rtk.train import (
    CHECKPOINT,
    Checkpoint,
    accuracy,
    resolve_arithmetic,
    resolve_device,
    seed_everything,
    set_threads,
)
from rtk.transfer.finetune import finetune
from rtk.transfer.linear import linear_bn_update, linear_frozen
from rtk.transfer.task import Task

modes: Registry[Callable[..., None]] = Registry("transfer mode")
for _mode in (finetune, linear_bn_update, linear_frozen):
    modes.register(_mode.__name__)(_mode)

_DENSE = {"scheme": "dense", "granularity": None, "sparsity": 0.0, "actual_sparsity": 0.0}


def run(config: TransferConfig) -> Path:
    """Transfer as `config` says and return the checkpoint's path.

    A run that was stopped goes on where it was; a finished one is left as it is.

    Raises:
        RtkError: for bad settings, data, checkpoint or ticket, a ticket for another network, or
            a loss that becomes NaN.
    """
    mode = modes.get(config.mode)
    device = resolve_device(config.device)
    set_threads(config.threads)
    checkpoint = Checkpoint.load(config.checkpoint).require_finished()
    lineage = {**checkpoint.lineage, **_DENSE}
    ticket = None
    if config.ticket is not None:
        ticket = Ticket.load(find_artefact(config.ticket, TICKET))
        ticket.check_model(checkpoint.spec)
        if ticket.meta.get("source_sha256", checkpoint.sha256) != checkpoint.sha256:
            warnings.warn(
                f"the ticket {config.ticket} was drawn from another checkpoint than "
                f"{config.checkpoint}: its masks go over weights that did not choose them",
                stacklevel=2,
            )
        lineage |= ticket.meta.get("lineage", {})
    dataset = data.load(config.data)

    seed_everything(config.seed)
    model = checkpoint.build_model()
    if ticket is not None:
        ticket.apply(model)
    models.replace_head(
        model, len(dataset.classes), generator=torch.Generator().manual_seed(config.seed)
    )
    folder = claim_folder(config)
    model.to(device)
    channels_last, _ = resolve_arithmetic(config.train, device)
    task = Task(
        dataset,
        dataset.augment if config.data.augment == "auto" else config.data.augment,
        config.train,
        {
            "batch_size": config.train.batch_size,
            "seed": config.seed,
            "device": device,
            "channels_last": channels_last,
        },
    )
    test = data.Batches(dataset.test, config.train.batch_size, device=device)
    mode(
        model,
        task,
        folder=folder,
        meta={
            "stage": "transfer",
            "config": to_dict(config),
            "config_hash": config_hash(config),
            "classes": list(dataset.classes),
            "source_sha256": checkpoint.sha256,
            "ticket_sha256": None if ticket is None else ticket.meta["sha256"],
            "lineage": {
                **lineage,
                "target": config.data.name,
                "transfer": config.mode,
                "seed": config.seed,
            },
        },
        evaluate=lambda m: {"top1": accuracy(m, test).top1},
        resume=config.resume,
        label=f"transfer {config.mode}",
    )
    return folder / CHECKPOINT
