"""Gaussian noise on the images: the pretraining of randomised smoothing (Cohen et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from rtk import ops
from rtk.attacks.checks import check_batch
from rtk.attacks.seeds import Seed, draw_seed
from rtk.errors import RtkError


@dataclass(frozen=True)
class Smoothing:
    """`smoothing(model, x, y)` returns x + sigma N(0, 1) (arXiv 1902.02918).

    The noise is added before the model normalises and is not clipped: a certificate holds for the
    noise that the model was trained on and is sampled with. Neither model nor labels are used.

    Args:
        sigma: standard deviation in [0, 1] pixel scale, e.g. 0.25.

    Raises:
        RtkError: for a negative sigma.
    """

    sigma: float = 0.25

    def __post_init__(self) -> None:
        if not self.sigma >= 0:
            raise RtkError(f"Smoothing: sigma must be >= 0 in pixel scale, got {self.sigma}")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, seed: Seed | None = None) -> Tensor:
        """Return noisy images.

        Args:
            model: not used.
            x: (N, C, H, W) images in [0, 1], floating.
            y: (N,) int64 labels, not used.
            seed: of the noise, in [0, 2**63), or a one-element int64 tensor; drawn from torch's
                generator where None.

        Raises:
            RtkError: for images that are not floating.
        """
        check_batch(x, y)
        if seed is None:
            seed = self.draw_seed()
        return ops.gaussian_noise(x.detach(), sigma=self.sigma, seed=seed)

    def draw_seed(self) -> int:
        """Return the seed of one call, drawn from torch's global generator.

        A CUDA graph draws it before each replay and gives it as a tensor.
        """
        return draw_seed()
