"""Evaluate: what a checkpoint can do on the test images, written as one result.json."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

from torch import nn

from rtk import attacks, data, distributed, models
from rtk.config import DataConfig, EvaluateConfig
from rtk.errors import RtkError
from rtk.evaluate import segmentation
from rtk.evaluate.certify import Smoothed, certified_radius, certify_split, lower_bound
from rtk.evaluate.frechet import Extractor, Gaussian, Moments, frechet_distance, statistics_of
from rtk.evaluate.ood import confidences, roc_auc
from rtk.evaluate.result import RESULT, is_there, write_result
from rtk.identity import claim_folder
from rtk.train import (
    Accuracy,
    Checkpoint,
    ConfusionMatrix,
    accuracy,
    resolve_device,
    seed_everything,
    set_threads,
)


@distributed.stage
def run(config: EvaluateConfig) -> Path:
    """Evaluate as `config` says and return the path of result.json.

    The result holds the numbers and the lineage of the model (columns of a report): `top1` and
    `mean_per_class` on the images as they are, `pgd_top1` under `attack`, whatever that is, with
    `certify.sigma` what `certify_split` returns, as `certified`, and as `ood_auc` the ROC-AUC of
    the confidence against each set of `ood`, resized to these images' size. One that is there
    already, of the same configuration and checkpoint, is left as it is. A segmentation network
    has `miou`, `pixel_accuracy` and `class_iou` instead.

    Raises:
        RtkError: for bad settings, data or checkpoint, or an attack that met gradients that are
            not finite.
    """
    device = resolve_device(config.device)
    set_threads(config.threads)
    checkpoint = Checkpoint.load(config.checkpoint).require_finished()
    if isinstance(checkpoint.spec, models.SegmentationSpec):
        return distributed.from_main(segmentation.run, config, checkpoint, device)
    data_config = checkpoint.images(config.data)
    dataset = data.load(data_config)
    classes = checkpoint.meta.get("classes", list(dataset.classes))
    if classes != list(dataset.classes):
        warnings.warn(
            f"the network was trained on the classes {', '.join(classes)}; "
            f"{data_config.name} has {', '.join(dataset.classes)}",
            stacklevel=2,
        )
    attack = attacks.create(config.attack, evaluating=True)
    others = _other_sets(config, data_config, dataset)
    path = claim_folder(config) / RESULT
    if distributed.from_main(is_there, path, config, checkpoint):
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
    areas = {}
    if others:
        areas["ood_auc"] = distributed.from_main(_areas, model, batches, others)
    numbers = {
        "attack": None if attack is None else config.attack.summary,
        "top1": natural.top1,
        "mean_per_class": natural.mean_per_class,
        "pgd_top1": None if adversarial is None else adversarial.top1,
        "images": natural.images,
        **certified,
        **areas,
    }
    distributed.from_main(write_result, path, config, checkpoint, data_config.name, numbers)
    return path


def _areas(
    model: nn.Module, batches: data.Batches, others: dict[str, data.Split]
) -> dict[str, float]:
    """Return the ROC-AUC of the confidence against each of the other sets."""
    size, device = batches.batch_size, batches.device
    inside = confidences(model, batches)
    return {
        name: roc_auc(inside, confidences(model, data.Batches(split, size, device=device)))
        for name, split in others.items()
    }


def _other_sets(
    config: EvaluateConfig, inside: DataConfig, dataset: data.Dataset
) -> dict[str, data.Split]:
    """Return the test images of the sets of `ood`, at the size of those they are told from."""
    if inside.name in config.ood:
        raise RtkError(
            f"ood: {inside.name} is the set that is evaluated on, and nothing tells it from "
            "itself; name others"
        )
    like = dataclasses.replace(inside, image_size=dataset.image_size)
    return {name: data.load(dataclasses.replace(like, name=name)).test for name in config.ood}


__all__ = [
    "RESULT",
    "Accuracy",
    "ConfusionMatrix",
    "Extractor",
    "Gaussian",
    "Moments",
    "Smoothed",
    "accuracy",
    "certified_radius",
    "certify_split",
    "confidences",
    "frechet_distance",
    "lower_bound",
    "roc_auc",
    "run",
    "statistics_of",
]
