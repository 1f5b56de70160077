"""Settings of `rtk advise`."""

from __future__ import annotations

from dataclasses import dataclass, field

from rtk.config.checks import check_sets, require
from rtk.config.data import DataConfig, unnamed
from rtk.config.stage import StageConfig


@dataclass(frozen=True)
class AdviseConfig(StageConfig):
    """Advise robust or natural tickets for a target, by its Fréchet distance from the source.

    Args:
        out: folder that keeps the statistics of sets and the answers; one serves all questions.
        data: the set of pretraining; but for the name, targets are read in the same way. Without
            an image_size each set keeps its own, and with features it is the one that the network
            was trained on, or else the source's.
        targets: the downstream sets.
        weights: file with Inception v3's weights, pytorch-fid's or torchvision's.
        features: a run or checkpoint whose own pooled features take the place of Inception's; its
            distances are on a scale of their own.
        source_images: training images of the source, chosen by the seed, the same for every target.
        batch_size: images at a time.
    """

    out: str = "runs/advise"
    data: DataConfig = field(default_factory=unnamed)
    targets: tuple[str, ...] = ()
    weights: str | None = None
    features: str | None = None
    source_images: int = 8000
    batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sets("targets", self.targets)
        require(self.source_images > 1, "source_images", "at least 2 images", self.source_images)
        require(self.batch_size > 0, "batch_size", "at least 1 image", self.batch_size)
        require(
            self.weights is None or self.features is None,
            "features",
            "null beside weights, as one network is measured with",
            self.features,
        )
