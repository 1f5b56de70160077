"""Settings of `rtk evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field

from rtk.config.attack import AttackConfig
from rtk.config.checks import check_sets, require
from rtk.config.data import DataConfig, unnamed
from rtk.config.stage import StageConfig


def _pgd20() -> AttackConfig:
    return AttackConfig(name="pgd", eps=8 / 255, steps=20)  # its step is eps / 4 = 2 / 255


@dataclass(frozen=True)
class CertifyConfig:
    """Certified accuracy of the network smoothed by Gaussian noise (Cohen et al. 2019), in L2.

    Args:
        sigma: standard deviation of the noise in [0, 1] pixel scale, the one of the pretraining;
            null certifies nothing.
        n0: noisy copies of an image that select its class.
        n: noisy copies that estimate how often that class wins.
        alpha: probability that a certificate is wrong.
        images: how many test images are certified, evenly spaced; null is all.
        batch_size: noisy copies at a time.
        radii: L2 radii at which certified accuracy is reported.
    """

    sigma: float | None = None
    n0: int = 100
    n: int = 100_000
    alpha: float = 0.001
    images: int | None = 500
    batch_size: int = 1000
    radii: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)

    def __post_init__(self) -> None:
        require(
            self.sigma is None or self.sigma > 0,
            "certify.sigma",
            "a deviation > 0 in pixel scale, or null",
            self.sigma,
        )
        for name in ("n0", "n", "batch_size"):
            require(getattr(self, name) >= 1, f"certify.{name}", "at least 1", getattr(self, name))
        require(0 < self.alpha < 1, "certify.alpha", "a probability in (0, 1)", self.alpha)
        require(
            self.images is None or self.images >= 1,
            "certify.images",
            "at least 1 image, or null",
            self.images,
        )
        require(
            all(radius >= 0 for radius in self.radii), "certify.radii", "radii >= 0", self.radii
        )


@dataclass(frozen=True)
class EvaluateConfig(StageConfig):
    """Measure accuracy, natural, adversarial and certified, on the test images.

    Args:
        checkpoint: the network: a run's folder or its checkpoint.safetensors.
        data: the images; an empty name takes those the network was trained on.
        attack: pgd for adversarial accuracy (PGD-20, Linf 8/255 by default), apgd-ce or square for
            a stronger check, or none.
        certify: certified accuracy of the smoothed network; none by default.
        ood: other sets, e.g. [svhn,cifar100], whose test images are told from these by the
            network's confidence (ROC-AUC); names in brackets go in quotes, '["digits[5-9]"]'.
        batch_size: images at a time.
    """

    checkpoint: str = ""
    data: DataConfig = field(default_factory=unnamed)
    attack: AttackConfig = field(default_factory=_pgd20)
    certify: CertifyConfig = field(default_factory=CertifyConfig)
    ood: tuple[str, ...] = ()
    batch_size: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.batch_size > 0, "batch_size", "at least 1 image", self.batch_size)
        check_sets("ood", self.ood)
        require(
            self.attack.bn_mode == "eval",
            "attack.bn_mode",
            "eval, as train would change the model that is measured",
            self.attack.bn_mode,
        )
