"""The evaluation of a segmentation network: mIoU and pixel accuracy of its test images."""

from __future__ import annotations

from pathlib import Path

import torch

from rtk.config import EvaluateConfig
from rtk.data import segmentation
from rtk.errors import RtkError
from rtk.evaluate.result import RESULT, is_there, write_result
from rtk.identity import claim_folder
from rtk.train import Checkpoint, segmentation_accuracy


def run(config: EvaluateConfig, checkpoint: Checkpoint, device: torch.device) -> Path:
    """Evaluate a segmentation network and return the path of result.json.

    `miou`, `pixel_accuracy` and `class_iou` are over all pixels of the test images at their full
    size, but those that are ignored.

    Raises:
        RtkError: for data that are missing or of other classes, or where an attack, certificates
            or out-of-distribution sets are asked for.
    """
    asked = {
        "attack.name": (config.attack.name, "none"),
        "certify.sigma": (config.certify.sigma, None),
        "ood": (config.ood, ()),
    }
    for name, (value, nothing) in asked.items():
        if value != nothing:
            shown = "null" if nothing is None else nothing or "[]"
            raise RtkError(
                f"{name}: expected {shown} for a segmentation network, which is measured on "
                f"images as they are, got {value!r}; give --{name} {shown}"
            )
    data_config = checkpoint.images(config.data)
    dataset = segmentation.load(data_config)
    classes = checkpoint.meta.get("classes", list(dataset.classes))
    if len(classes) < len(dataset.classes):
        raise RtkError(
            f"the network was trained on {len(classes)} classes and {data_config.name} has "
            f"{len(dataset.classes)}: their masks do not mean the same"
        )
    path = claim_folder(config) / RESULT
    if is_there(path, config, checkpoint):
        return path
    images = segmentation.WholeImages(dataset.test, config.batch_size, device=device)
    found = segmentation_accuracy(checkpoint.build_model().to(device), images)
    numbers = {
        "attack": None,
        "miou": found.miou,
        "pixel_accuracy": found.pixel_accuracy,
        "class_iou": dict(zip(classes, found.class_iou, strict=True)),
        "images": found.images,
    }
    write_result(path, config, checkpoint, data_config.name, numbers)
    return path
