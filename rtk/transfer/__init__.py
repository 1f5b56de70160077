"""Transfer: a ticket, with the weights it was drawn from, to a downstream task."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rtk import data, distributed, models
from rtk.config import TransferConfig
from rtk.data import segmentation
from rtk.errors import RtkError
from rtk.identity import claim_folder, config_hash, to_dict
from rtk.registry import Registry
from rtk.runs import find_artefact
from rtk.ticket import TICKET, Ticket
from rtk.train import (
    CHECKPOINT,
    Checkpoint,
    accuracy,
    check_batch_size,
    resolve_arithmetic,
    resolve_device,
    seed_everything,
    segmentation_accuracy,
    set_threads,
)
from rtk.transfer.finetune import finetune
from rtk.transfer.linear import linear_bn_update, linear_frozen
from rtk.transfer.segment import SegmentTask, segment, segmentation_network
from rtk.transfer.task import Task

modes: Registry[Callable[..., None]] = Registry("transfer mode")
for _mode in (finetune, linear_bn_update, linear_frozen, segment):
    modes.register(_mode.__name__)(_mode)

_DENSE = {"scheme": "dense", "granularity": None, "sparsity": 0.0, "actual_sparsity": 0.0}


@distributed.stage
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
    check_batch_size(config.train.batch_size)
    checkpoint = Checkpoint.load(config.checkpoint).require_finished()
    if isinstance(checkpoint.spec, models.SegmentationSpec):
        raise RtkError(
            f"checkpoint {checkpoint.path} is a segmentation network; transfer from the pretrained "
            "classification network"
        )
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
    segmenting = config.mode == "segment"
    dataset: Any = (segmentation.load if segmenting else data.load)(config.data)

    seed_everything(config.seed)
    model = checkpoint.build_model()
    if ticket is not None:
        ticket.apply(model)
    channels_last, _ = resolve_arithmetic(config.train, device)
    size = config.train.batch_size
    batches = {
        "batch_size": size,
        "seed": config.seed,
        "device": device,
        "channels_last": channels_last,
    }
    task: Task | SegmentTask
    if segmenting:
        model = segmentation_network(model, len(dataset.classes), config.segment)
        task = SegmentTask(dataset, config.data.augment, config.train, config.segment, batches)
        whole = segmentation.WholeImages(dataset.test, size, device=device)
        evaluate = functools.partial(_segmentation_numbers, images=whole)
    else:
        models.replace_head(
            model, len(dataset.classes), generator=torch.Generator().manual_seed(config.seed)
        )
        augment = dataset.augment if config.data.augment == "auto" else config.data.augment
        task = Task(dataset, augment, config.train, batches)
        test = data.Batches(dataset.test, size, device=device)
        evaluate = functools.partial(_accuracy_numbers, images=test)
    folder = claim_folder(config)
    model.to(device)
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
        evaluate=evaluate,
        resume=config.resume,
        label=f"transfer {config.mode}",
    )
    return folder / CHECKPOINT


def _accuracy_numbers(model: nn.Module, *, images: data.Batches) -> dict[str, float]:
    return {"top1": accuracy(model, images).top1}


def _segmentation_numbers(
    model: nn.Module, *, images: segmentation.WholeImages
) -> dict[str, float]:
    found = segmentation_accuracy(model, images)
    return {"miou": found.miou, "pixel_accuracy": found.pixel_accuracy}
