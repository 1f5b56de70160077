"""FGSM: one step to the corner of the ball (Goodfellow et al. 2015)."""

from __future__ import annotations

from rtk.attacks.pgd import PGD


class FGSM(PGD):
    """PGD's one step of length `eps` from the image (arXiv 1412.6572).

    Args:
        norm: "linf" (the sign of the gradient) or "l2" (its direction).
        eps: radius in [0, 1] pixel scale, e.g. 8/255.
        bn_mode: batch norm while attacking, "eval" or "train".
        targeted: `y` are the labels to reach.
    """

    def __init__(
        self,
        norm: str = "linf",
        eps: float = 8 / 255,
        bn_mode: str = "eval",
        *,
        targeted: bool = False,
    ) -> None:
        super().__init__(norm, eps, eps, 1, False, bn_mode, targeted=targeted)
