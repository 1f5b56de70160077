"""Draw: a ticket out of a pretrained network, by one of the schemes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from torch import nn

from rtk import distributed
from rtk.config import ITERATIVE, DrawConfig
from rtk.draw import iterative, learned
from rtk.draw.granularity import group_scores, mask_shape, prunable_layers
from rtk.draw.imp import imp
from rtk.draw.lmp import LmpStep, lmp, make_lmp_step
from rtk.draw.omp import omp
from rtk.draw.training import record
from rtk.identity import claim_folder, config_hash
from rtk.registry import Registry
from rtk.ticket import TICKET, Ticket
from rtk.train import Checkpoint, resolve_device, seed_everything, set_threads

schemes: Registry[Callable[[nn.Module, DrawConfig], Ticket]] = Registry("scheme")


@schemes.register("omp")
def _omp(model: nn.Module, config: DrawConfig) -> Ticket:
    scope, include_first = str(config.scope), bool(config.include_first)  # resolved by now
    return omp(model, config.sparsity, config.granularity, scope, include_first)


schemes.register("lmp")(learned.draw)
for _name in ITERATIVE:
    schemes.register(_name)(iterative.draw)


@distributed.stage
def run(config: DrawConfig) -> Path:
    """Draw a ticket as `config` says and return its path.

    A ticket that is there already, drawn alike from the same checkpoint, is left as it is. A scheme
    that trains goes on where it was stopped; under torchrun only such a scheme takes more than one
    process.

    Raises:
        RtkError: for bad settings or checkpoint, or a ticket in the folder that is damaged.
    """
    scheme = schemes.get(config.scheme)
    if config.scheme in ("lmp", *ITERATIVE):
        return _run(config, scheme)
    return distributed.from_main(_run, config, scheme)


def _run(config: DrawConfig, scheme: Callable[[nn.Module, DrawConfig], Ticket]) -> Path:
    device = resolve_device(config.device)
    set_threads(config.threads)
    checkpoint = Checkpoint.load(config.checkpoint).require_finished()
    path = Path(config.out) / TICKET
    if config.resume and distributed.from_main(path.exists):
        claim_folder(config)
        there = Ticket.load(path).meta
        made_of = (there.get("source_sha256"), there.get("config_hash"))
        if made_of == (checkpoint.sha256, config_hash(config)):
            return path
    seed_everything(config.seed)
    # A scheme that works in the folder claims it, once nothing in the settings can be wrong.
    ticket = scheme(checkpoint.build_model().to(device), config)
    claim_folder(config)
    meta = {
        **ticket.meta,
        **record(config, checkpoint.sha256),
        "lineage": {
            "scheme": config.scheme,
            "granularity": config.granularity,
            "sparsity": config.sparsity,
            "actual_sparsity": ticket.sparsity,
            **ticket.meta.get("lineage", {}),
        },
    }
    if distributed.is_main():
        dataclasses.replace(ticket, meta=meta).save(path)
    return path


__all__ = [
    "LmpStep",
    "group_scores",
    "imp",
    "lmp",
    "make_lmp_step",
    "mask_shape",
    "omp",
    "prunable_layers",
    "run",
    "schemes",
]
