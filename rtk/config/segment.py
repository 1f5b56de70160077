"""Settings of a segmentation, a section of those of `rtk transfer`."""

from __future__ import annotations

from dataclasses import dataclass

from rtk.config.checks import require
from rtk.errors import check_choice

SEGMENTATION_NETWORKS = ("deeplabv3plus", "fcn")


@dataclass(frozen=True)
class SegmentConfig:
    """Semantic segmentation with a ticket as its backbone.

    Args:
        network: deeplabv3plus or fcn.
        output_stride: pixels of the image between two of the backbone's last features: 16, 8 or 32
            with the 7x7 stem, 4, 2 or 8 with the 3x3 stem; null is the first of them.
        crop_size: side in pixels of the windows that are trained on; null is 513 with the 7x7 stem,
            the images' shorter side with the 3x3 stem.
        epoch_steps: iterations that make an epoch, by which epochs and milestones of train count;
            null is one pass over the images.
        backbone_lr: learning rate of the pretrained weights; train.lr is the head's, and the
            schedule is the same for both.
        backbone_bn_momentum: share of a batch in the running statistics of the backbone.
    """

    network: str = "deeplabv3plus"
    output_stride: int | None = None
    crop_size: int | None = None
    epoch_steps: int | None = 1000
    backbone_lr: float = 0.001
    backbone_bn_momentum: float = 0.01

    def __post_init__(self) -> None:
        check_choice("segmentation network", self.network, SEGMENTATION_NETWORKS)
        for name in ("output_stride", "crop_size", "epoch_steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"segment.{name}", "at least 1, or null", value)
        require(self.backbone_lr >= 0, "segment.backbone_lr", "a rate >= 0", self.backbone_lr)
        require(
            0 <= self.backbone_bn_momentum <= 1,
            "segment.backbone_bn_momentum",
            "a share in [0, 1]",
            self.backbone_bn_momentum,
        )
