"""Fast adversarial training: FGSM from a random start (Wong et al. 2020), and its known failure."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from rtk.attacks.gradient import frozen_view
from rtk.attacks.pgd import PGD
from rtk.attacks.precision import accepting, image_losses

_SEED = 0  # of the comparison: it must not draw from the generator that training draws from
_GAP = 0.2  # Wong et al. stop a run whose PGD accuracy falls by 20 points


class Fast(PGD):
    """One step of 1.25 eps from a random point of the ball, projected (arXiv 2001.03994).

    Training on it can collapse: within an epoch the network learns to fool the single step and
    loses all robustness ("catastrophic overfitting"), while the training loss looks better than
    ever. `after_epoch` tells.

    Args:
        norm: "linf" or "l2".
        eps: radius in [0, 1] pixel scale, e.g. 8/255.
        step_size: length of the step; None is 1.25 eps.
        bn_mode: batch norm while attacking, "eval" or "train".
    """

    def __init__(
        self,
        norm: str = "linf",
        eps: float = 8 / 255,
        step_size: float | None = None,
        bn_mode: str = "eval",
    ) -> None:
        step_size = 1.25 * eps if step_size is None else step_size
        super().__init__(norm, eps, step_size, 1, True, bn_mode)
        self._warned = False

    def after_epoch(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        """Warn, once, if `model` withstands the single step but not ten small ones.

        The training loop calls it once an epoch, with the epoch's last batch; it synchronises,
        leaves the model and torch's generators alone, and costs some 13 passes over the batch.

        Args:
            model: being trained.
            x: (N, C, H, W) images in [0, 1].
            y: (N,) int64 labels.
        """
        if self._warned or len(x) == 0:
            return
        steps = PGD(self.norm, self.eps, self.eps / 4, 10)
        single = PGD(self.norm, self.eps, self.step_size, 1)
        (fast, fast_loss), (slow, slow_loss) = (
            _under(model, attack(model, x, y, seed=_SEED), y) for attack in (single, steps)
        )
        if fast - slow <= _GAP:
            return
        self._warned = True
        warnings.warn(
            f"catastrophic overfitting: of {len(x)} training images {fast:.0%} are classified "
            f"right under the single step (loss {fast_loss:.3g}) but only {slow:.0%} under PGD-10 "
            f"(loss {slow_loss:.3g}), both {self.norm} {self.eps:.4g}: the network fools the "
            "single step and is not robust. Go back to an earlier checkpoint; train with a "
            "smaller --attack.step_size (eps or less), fewer epochs, or --attack.name pgd",
            stacklevel=2,
        )


def _under(model: nn.Module, x_adv: Tensor, y: Tensor) -> tuple[float, float]:
    """Return accuracy and mean loss of `model` in eval mode."""
    with torch.no_grad(), frozen_view(model, "eval"):
        logits = accepting(model, x_adv)(x_adv)
    right = (logits.argmax(1) == y).float().mean()
    return right.item(), image_losses(logits, y).mean().item()
