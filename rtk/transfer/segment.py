"""Segmentation: the ticket becomes the backbone of a network that gives every pixel a class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtk import models
from rtk.config import SegmentConfig, TrainConfig
from rtk.data.segmentation import IGNORED, SegmentationBatches, SegmentationDataset
from rtk.errors import RtkError
from rtk.models import Classifier, SegmentationNetwork, SegmentationSpec
from rtk.nn import MaskedConv2d, mask_model
from rtk.ticket import Ticket
from rtk.train import load_state, make_optimizer, resolve_arithmetic, train

_CROP = 513  # DeepLab's
_AUGMENTATIONS = {"auto": "scale_crop_flip", "flip": "flip", "none": "none"}


@dataclass(frozen=True)
class SegmentTask:
    """A downstream task with masks.

    Args:
        dataset: its images.
        augment: none or flip, of whole images, or auto: scale, crop and flip.
        config: how to train.
        segment: the same.
        batches: the arguments of the batches: batch_size, seed, device, channels_last.

    Raises:
        RtkError: for another augmentation, or a single training image.
    """

    dataset: SegmentationDataset
    augment: str
    config: TrainConfig
    segment: SegmentConfig
    batches: dict[str, Any]

    def __post_init__(self) -> None:
        if self.augment not in _AUGMENTATIONS:
            raise RtkError(
                f"data.augment: expected auto (scale, crop and flip), flip or none for "
                f"segmentation, got {self.augment!r}"
            )
        if len(self.dataset.train) < 2:
            raise RtkError(
                f"{self.dataset.name}: expected at least 2 training images, which batch norm "
                f"needs, got {len(self.dataset.train)}"
            )

    def train_batches(self, stem: str) -> SegmentationBatches:
        """Return the shuffled, augmented training images for a network with `stem`."""
        split = self.dataset.train
        crop = self.segment.crop_size or (_CROP if stem == "7x7" else min(split.masks.shape[1:]))
        return SegmentationBatches(
            split,
            augment=_AUGMENTATIONS[self.augment],
            crop_size=crop,
            epoch_steps=self.segment.epoch_steps,
            **self.batches,
        )


def segmentation_network(
    classifier: Classifier, num_classes: int, config: SegmentConfig
) -> SegmentationNetwork:
    """Return a new segmentation network with the weights and masks of `classifier` as backbone.

    The head is drawn from torch's global random state, and no ticket masks it.

    Args:
        classifier: a pretrained ResNet, masked or not; it stays as it is.
        num_classes: outputs of each pixel.
        config: network and output stride.

    Raises:
        RtkError: for a network that has no such backbone, or a stride that its stem cannot have.
    """
    spec = classifier.spec
    network = models.create(
        SegmentationSpec(
            spec.arch,
            spec.stem,
            spec.width,
            num_classes,
            spec.mean,
            spec.std,
            config.network,
            config.output_stride,
        )
    )
    assert isinstance(network, SegmentationNetwork)
    if any(isinstance(module, MaskedConv2d) for module in classifier.modules()):
        ticket = Ticket.from_model(classifier)
        masks = {f"backbone.{name}": mask for name, mask in ticket.masks.items()}
        shapes = {f"backbone.{name}": shape for name, shape in ticket.shapes.items()}
        mask_model(network, Ticket(masks, shapes))
    head = f"{classifier.head_name}."
    state = {n: t for n, t in classifier.state_dict().items() if not n.startswith(head)}
    load_state(network.backbone, state, "the pretrained backbone")
    return network


def pixel_cross_entropy(logits: Tensor, masks: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy over the pixels that are not ignored; 0 where all are.

    Args:
        logits: (N, C, H, W) floating.
        masks: (N, H, W) int64 classes, 255 where a pixel is ignored: its gradient is exactly 0.
        label_smoothing: in [0, 1).
    """
    total = F.cross_entropy(
        logits, masks, ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing
    )
    return total / (masks != IGNORED).sum().clamp_min(1)


def segment(model: SegmentationNetwork, task: SegmentTask, **loop: Any) -> None:
    """Train all parameters of `model`, its backbone at a rate and a batch-norm momentum of its own.

    Pruned weights stay exactly 0, as in finetuning.
    """
    config = task.config
    channels_last, _ = resolve_arithmetic(config, next(model.parameters()).device)
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in model.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = task.segment.backbone_bn_momentum
    optimizer = make_optimizer(model.classifier.parameters(), config)
    optimizer.add_param_group(
        {
            "params": [*model.backbone.parameters()],
            "lr_factor": task.segment.backbone_lr / config.lr,
        }
    )

    def loss(logits: Tensor, masks: Tensor) -> Tensor:
        return pixel_cross_entropy(logits, masks, config.label_smoothing)

    batches = task.train_batches(model.spec.stem)
    train(model, batches, config, optimizer=optimizer, loss=loss, **loop)
