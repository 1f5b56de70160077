"""Evaluate: what a checkpoint can do on the test images, written as one result.json."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

from rtk import attacks, data
from rtk._version import __version__
from rtk.config import DataConfig, EvaluateConfig
from rtk.errors import RtkError
from rtk.evaluate.certify import Smoothed, certified_radius, certify_split, lower_bound
from rtk.identity import claim_folder, config_hash, from_dict
from rtk.runs import read_json, write_json
from rtk.train import Accuracy, Checkpoint, accuracy, resolve_device, seed_everything, set_threads

RESULT = "result.json"


def run(config: EvaluateConfig) -> Path:
    """Evaluate as `config` says and return the path of result.json.

    The result holds the numbers and the lineage of the model (columns of a report): `top1` and
    `mean_per_class` on the images as they are, `pgd_top1` under `attack`, whatever that is, and
    with `certify.sigma` what `certify_split` returns, as `certified`. One that is there already,
    of the same configuration and checkpoint, is left as it is.

    Raises:
        RtkError: for bad settings, data or checkpoint, or an attack that met gradients that are
            not finite.
    """
    device = resolve_device(config.device)
    set_threads(config.threads)
    checkpoint = Checkpoint.load(config.checkpoint).require_finished()
    data_config = _images(config, checkpoint)
    dataset = data.load(data_config)
    classes = checkpoint.meta.get("classes", list(dataset.classes))
    if classes != list(dataset.classes):
        warnings.warn(
            f"the network was trained on the classes {', '.join(classes)}; "
            f"{data_config.name} has {', '.join(dataset.classes)}",
            stacklevel=2,
        )
    attack = attacks.create(config.attack, evaluating=True)
    path = claim_folder(config) / RESULT
    if config.resume and path.exists():
        there = read_json(path)
        made_of = (there.get("checkpoint_sha256"), there.get("config_hash"))
        if made_of == (checkpoint.sha256, config_hash(config)):
            return path
    model = checkpoint.build_model().to(device)
    batches = data.Batches(dataset.test, config.batch_size, device=device)
    natural = accuracy(model, batches)
    adversarial = None
    if attack is not None:
        seed_everything(config.seed)
        adversarial = accuracy(model, batches, attack)
        if hasattr(attack, "check_finite"):
            attack.check_finite()
    certified = {}
    if config.certify.sigma is not None:
        certified["certified"] = certify_split(
            model, dataset.test, config.certify, seed=config.seed, device=device
        )
    write_json(
        path,
        {
            "target": data_config.name,  # of a network that was not transferred
            **checkpoint.lineage,
            "evaluated_on": data_config.name,
            "attack": None if attack is None else config.attack.summary,
            "top1": natural.top1,
            "mean_per_class": natural.mean_per_class,
            "pgd_top1": None if adversarial is None else adversarial.top1,
            "images": natural.images,
            **certified,
            "config_hash": config_hash(config),
            "checkpoint_sha256": checkpoint.sha256,
            "rtk": __version__,
        },
    )
    return path


def _images(config: EvaluateConfig, checkpoint: Checkpoint) -> DataConfig:
    """Return which images to measure on: those that are named, or the network's own."""
    if config.data.name:
        return config.data
    values = checkpoint.meta.get("config", {}).get("data")
    if values is None:
        raise RtkError(
            f"checkpoint {checkpoint.path} does not say what it was trained on; "
            "name the images with --data.name"
        )
    own = from_dict(DataConfig, values)
    return dataclasses.replace(
        own,
        root=config.data.root or own.root,
        image_size=config.data.image_size or own.image_size,
    )


__all__ = [
    "RESULT",
    "Accuracy",
    "Smoothed",
    "accuracy",
    "certified_radius",
    "certify_split",
    "lower_bound",
    "run",
]
