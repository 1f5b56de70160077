"""Evaluate: what a checkpoint can do on the test images, written as one result.json."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rtk import attacks, data
from rtk._version import __version__
from rtk.config import DataConfig, EvaluateConfig, claim_folder, config_hash, from_dict
from rtk.runs import read_json, write_json
from rtk.train import Accuracy, Checkpoint, accuracy, resolve_device, seed_everything

RESULT = "result.json"


def run(config: EvaluateConfig) -> Path:
    """Evaluate as `config` says and return the path of result.json.

    The result holds the numbers and the lineage of the model (columns of a report). One that is
    there already, of the same configuration and checkpoint, is left as it is.

    Raises:
        RtkError: for bad settings, data or checkpoint.
    """
    folder = claim_folder(config)
    device = resolve_device(config.device)
    checkpoint = Checkpoint.load(config.checkpoint).require_finished()
    path = folder / RESULT
    if (
        config.resume
        and path.exists()
        and read_json(path)["checkpoint_sha256"] == checkpoint.sha256
    ):
        return path
    data_config = config.data
    if not data_config.name:
        trained_on = from_dict(DataConfig, checkpoint.meta["config"]["data"])
        data_config = dataclasses.replace(trained_on, root=config.data.root or trained_on.root)
    dataset = data.load(data_config)
    model = checkpoint.build_model().to(device)
    batches = data.Batches(dataset.test, config.batch_size, device=device)
    natural = accuracy(model, batches)
    attack = attacks.create(config.attack)
    adversarial = None
    if attack is not None:
        seed_everything(config.seed)
        adversarial = accuracy(model, batches, attack)
    write_json(
        path,
        {
            **checkpoint.lineage,
            "evaluated_on": data_config.name,
            "attack": None
            if attack is None
            else f"{config.attack.label}, {config.attack.steps} steps",
            "top1": natural.top1,
            "mean_per_class": natural.mean_per_class,
            "pgd_top1": None if adversarial is None else adversarial.top1,
            "images": natural.images,
            "config_hash": config_hash(config),
            "checkpoint_sha256": checkpoint.sha256,
            "rtk": __version__,
        },
    )
    return path


__all__ = ["RESULT", "Accuracy", "accuracy", "run"]
