"""Mean intersection over union and pixel accuracy of a segmentation network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rtk.attacks.gradient import local_network
from rtk.attacks.precision import accepting
from rtk.data.segmentation import IGNORED, WholeImages
from rtk.train.miou import ConfusionMatrix


@dataclass(frozen=True)
class SegmentationAccuracy:
    """Fractions in [0, 1], over all pixels of all images together but those that are ignored.

    Args:
        miou: mean of the classes' intersections over unions, over the classes that occur in a mask
            or a prediction.
        pixel_accuracy: share of the pixels that are classified right.
        class_iou: of each class; None for one that does not occur.
        images: how many were looked at.
    """

    miou: float
    pixel_accuracy: float
    class_iou: tuple[float | None, ...]
    images: int


def segmentation_accuracy(model: nn.Module, images: WholeImages) -> SegmentationAccuracy:
    """Measure `model` in eval mode; every module's mode is put back afterwards.

    Args:
        model: takes images in [0, 1] and returns logits (N, C, H, W).
        images: one pass.

    Raises:
        RtkError: for a pixel that the model has no class for, or where every pixel is ignored.
    """
    model = local_network(model)
    training = [module for module in model.modules() if module.training]
    model.eval()
    counts, looked_at = None, 0
    try:
        for x, y in images:
            with torch.no_grad():
                logits = accepting(model, x)(x)
            if counts is None:
                counts = ConfusionMatrix(logits.shape[1], ignore=IGNORED, device=logits.device)
            counts.update(logits, y)
            looked_at += len(x)
    finally:
        for module in training:
            module.training = True
    assert counts is not None  # a split holds an image
    iou = counts.iou().tolist()
    table = counts.counts.double()
    return SegmentationAccuracy(
        counts.mean_iou(),
        (table.trace() / table.sum()).item(),
        tuple(None if value != value else value for value in iou),
        looked_at,
    )
