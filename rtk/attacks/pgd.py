"""PGD: projected gradient descent on the loss, in the Linf or L2 ball (Madry et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rtk import ops
from rtk.attacks.gradient import cross_entropy, input_gradient
from rtk.errors import RtkError, check_choice


@dataclass
class PGD:
    """An attack: `attack(model, x, y)` returns adversarial images.

    It climbs the cross-entropy by `steps` steps of `rtk.ops.pgd_step`. Only the gradient in the
    image is computed, and the model is left as it was found.

    Args:
        norm: "linf" or "l2".
        eps: radius in [0, 1] pixel scale, e.g. 8/255.
        step_size: length of a step, same scale.
        steps: number of gradient steps; 0 returns the (clipped) start.
        random_start: start at a random point of the ball, drawn from torch's global generator.
        bn_mode: batch norm while attacking: "eval" uses the running statistics and leaves them
            alone; "train" uses the batch's, and updates the running ones, as in training.
    """

    norm: str = "linf"
    eps: float = 8 / 255
    step_size: float = 2 / 255
    steps: int = 10
    random_start: bool = True
    bn_mode: str = "eval"
    _checked: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, ("linf", "l2"))
        check_choice("bn_mode", self.bn_mode, ("eval", "train"))
        for name in ("eps", "step_size", "steps"):
            if getattr(self, name) < 0:
                raise RtkError(f"PGD: {name} must be >= 0, got {getattr(self, name)}")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, seed: int | None = None) -> Tensor:
        """Return adversarial images for `model`.

        Args:
            model: takes images in [0, 1] (it normalises inside) and returns logits.
            x: (N, C, H, W) images in [0, 1].
            y: (N,) int64 labels.
            seed: of the random start; drawn from torch's generator where None.

        Raises:
            RtkError: for images that are not floating; on the first batch, for images outside
                [0, 1] or NaN, or labels that the model has no class for. Later batches are not
                looked at: that would synchronise.
        """
        if not x.is_floating_point():
            raise RtkError(f"attack: images must be floating, in [0, 1], got {x.dtype}")
        if not self._checked:
            _check_images(x)
        x_adv = x = x.detach()
        if self.random_start:
            if seed is None:
                seed = int(torch.randint(2**63 - 1, ()))
            x_adv = ops.pgd_init(x_adv, eps=self.eps, norm=self.norm, seed=seed)
        elif self.steps == 0:
            x_adv = x_adv.clamp(0, 1)
        with input_gradient(model, bn_mode=self.bn_mode, loss=self._loss) as gradient:
            for _ in range(self.steps):
                grad, _ = gradient(x_adv, y)
                x_adv = ops.pgd_step(
                    x_adv,
                    grad,
                    x,
                    eps=self.eps,
                    step_size=self.step_size,
                    norm=self.norm,
                )
        return x_adv

    def _loss(self, logits: Tensor, y: Tensor) -> Tensor:
        if not self._checked:  # before the loss: on a GPU a wrong label would end the process
            check_labels(y, logits)
            self._checked = True
        return cross_entropy(logits, y)


def _check_images(x: Tensor) -> None:
    if x.numel() == 0:
        return
    low, high = x.aminmax()
    if not (low >= 0 and high <= 1):  # a NaN fails both
        raise RtkError(
            f"attack: images must lie in [0, 1] and be finite, got {low.item():.4g} to "
            f"{high.item():.4g}; give pixels / 255 and let the model normalise"
        )


def check_labels(y: Tensor, logits: Tensor) -> None:
    """Raise an RtkError unless every label has a logit."""
    classes = logits.shape[1]
    if y.numel() and not (y.min() >= 0 and y.max() < classes):
        raise RtkError(
            f"labels must be in [0, {classes}), the model's classes, got {y.min().item()} to "
            f"{y.max().item()}"
        )
