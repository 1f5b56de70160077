"""Which network is trained."""

from __future__ import annotations

from dataclasses import dataclass

from rtk.config.checks import require
from rtk.errors import check_choice


@dataclass(frozen=True)
class ModelConfig:
    """Which network is trained.

    Args:
        arch: resnet18 or resnet50; or another network by name: a torchvision one, e.g. densenet121
            (torchvision:densenet121 in full), or timm:NAME.
        stem: of the ResNets: 3x3 (small images, no max-pool), 7x7 (ImageNet) or auto: 3x3 up to 64
            pixels. Other networks have one of their own, which auto stands for.
        width: multiplier of every layer's channels, e.g. 0.25 for a small machine; of the ResNets.
    """

    arch: str = "resnet18"
    stem: str = "auto"
    width: float = 1.0

    def __post_init__(self) -> None:
        check_choice("stem", self.stem, ("auto", "3x3", "7x7", "own"))
        require(self.width > 0, "model.width", "a positive multiplier", self.width)
