"""APGD-CE: projected gradient descent that chooses its own step sizes (Croce & Hein 2020)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rtk import ops
from rtk.attacks.best import per_image
from rtk.attacks.checks import Guard
from rtk.attacks.gradient import Gradient, input_gradient
from rtk.attacks.precision import accepting, image_losses
from rtk.attacks.seeds import Seed, draw_seed, following
from rtk.errors import RtkError, check_choice

_MOMENTUM = 0.75  # weight of the new step; the rest continues the last one
_DIVISION_EPS = 1e-12


@dataclass
class APGD:
    """Auto-PGD on the cross-entropy, without a step size to tune (arXiv 2003.01690).

    The step starts at 2 eps. At checkpoints, after 22 % of the iterations and then in intervals
    that shrink by 3 % down to 6 %, it is halved for each image whose loss rose in fewer than `rho`
    of the steps, or that found nothing better since the last checkpoint without a halving there;
    such an image goes on from its best iterate. As the authors' code does, to the bit.

    Args:
        norm: "linf" or "l2".
        eps: radius in [0, 1] pixel scale, e.g. 8/255.
        steps: iterations; each restart takes one gradient more. AutoAttack takes 100.
        restarts: random starts, >= 1; images that are misclassified already are left out of the
            later ones.
        rho: share of the steps in which the loss must rise, in [0, 1].
        bn_mode: only "eval": batch statistics would make images depend on each other.
        count_nonfinite: count the gradients that are NaN or infinite, for `check_finite` (see
            `rtk.attacks.checks`).

    Raises:
        RtkError: for an unknown norm, a number out of range, or another `bn_mode`.
    """

    norm: str = "linf"
    eps: float = 8 / 255
    steps: int = 100
    restarts: int = 1
    rho: float = 0.75
    bn_mode: str = "eval"
    count_nonfinite: bool = field(default=False, kw_only=True, compare=False)
    _guard: Guard = field(default_factory=Guard, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, ("linf", "l2"))
        check_choice("bn_mode for APGD", self.bn_mode, ("eval",))
        for name, least in (("eps", 0), ("steps", 0), ("restarts", 1)):
            if not getattr(self, name) >= least:
                raise RtkError(f"APGD: {name} must be >= {least}, got {getattr(self, name)}")
        if not 0 <= self.rho <= 1:
            raise RtkError(f"APGD: rho must be a share in [0, 1], got {self.rho}")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, seed: Seed | None = None) -> Tensor:
        """Return adversarial images for `model`.

        Args:
            model: takes images in [0, 1] (it normalises inside) and returns logits.
            x: (N, C, H, W) images in [0, 1], floating; N may be 0.
            y: (N,) int64 labels.
            seed: of the random starts, in [0, 2**63), or a one-element int64 tensor; drawn from
                torch's generator where None.

        Returns:
            A new tensor like `x`: of each image the last misclassified iterate, or where there is
            none the one with the highest loss.

        Raises:
            RtkError: as PGD does.
        """
        x = x.detach()
        network = accepting(model, x)
        with self._guard.batch(network, x, y, count=self.count_nonfinite) as watch:
            if len(x) == 0:
                return x.clone()
            if seed is None:
                seed = self.draw_seed()
            with input_gradient(network, bn_mode="eval", loss=image_losses) as gradient:
                return self._restart(watch(gradient), x, y, seed)

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold it: later restarts look at who is misclassified."""
        return self.restarts == 1

    def draw_seed(self) -> int:
        """Return the seed of one call, drawn from torch's global generator.

        A CUDA graph draws it before each replay and gives it as a tensor.
        """
        return draw_seed()

    def check_finite(self) -> None:
        """Raise an RtkError if `count_nonfinite` counted any since the last call; synchronises."""
        self._guard.check()

    def _restart(self, gradient: Gradient, x: Tensor, y: Tensor, seed: Seed) -> Tensor:
        out, loss, fooled = self._run(gradient, x, y, self._start(x, seed))
        for restart in range(1, self.restarts):
            rest = (~fooled).nonzero().squeeze(1)
            if len(rest) == 0:
                break
            start = self._start(x[rest], following(seed, restart))
            again, higher, won = self._run(gradient, x[rest], y[rest], start)
            take = won | (higher > loss[rest])
            out[rest] = torch.where(per_image(take, x), again, out[rest])
            loss[rest] = torch.where(take, higher, loss[rest])
            fooled[rest] = won
        return out

    def _start(self, x: Tensor, seed: Seed) -> Tensor:
        return ops.pgd_init(x, eps=self.eps, norm=self.norm, seed=seed)

    def _run(
        self, gradient: Gradient, x: Tensor, y: Tensor, x_adv: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return, of one start, the images, their highest losses and who is misclassified.

        Every image has its own step size and its own best; masks choose, nothing synchronises.
        """
        grad, logits = _in_dtype(x, *gradient(x_adv, y))
        best_loss = image_losses(logits, y)
        best, best_grad = x_adv, grad
        fooled = logits.argmax(1) != y
        adversarial = x_adv
        step_size = torch.full_like(per_image(best_loss, x), 2 * self.eps, dtype=x.dtype)
        before = x_adv
        # At the last checkpoint: the best loss, and whose step was halved. All count as halved
        # at first, and the loss before the first step as 0, as in the authors' code.
        loss_then, halved_then = best_loss, torch.ones_like(fooled)
        loss_before = torch.zeros_like(best_loss)
        rises = torch.zeros_like(best_loss)
        interval, least, shrink = (max(int(s * self.steps), 1) for s in (0.22, 0.06, 0.03))
        since = 0
        for i in range(self.steps):
            momentum = _MOMENTUM if i > 0 else 1.0
            moved = self._project(x_adv + step_size * self._direction(grad), x)
            moved = x_adv + (moved - x_adv) * momentum + (x_adv - before) * (1 - momentum)
            before, x_adv = x_adv, self._project(moved, x)

            grad, logits = _in_dtype(x, *gradient(x_adv, y))
            loss = image_losses(logits, y)
            wrong = logits.argmax(1) != y
            fooled = fooled | wrong
            adversarial = torch.where(per_image(wrong, x), x_adv, adversarial)
            higher = loss > best_loss
            best = torch.where(per_image(higher, x), x_adv, best)
            best_grad = torch.where(per_image(higher, x), grad, best_grad)
            best_loss = torch.where(higher, loss, best_loss)
            rises += loss > loss_before
            loss_before = loss

            since += 1
            if since == interval:
                halve = (rises <= self.rho * interval) | (~halved_then & (loss_then >= best_loss))
                step_size = torch.where(per_image(halve, x), step_size / 2, step_size)
                x_adv = torch.where(per_image(halve, x), best, x_adv)
                grad = torch.where(per_image(halve, x), best_grad, grad)
                loss_then, halved_then = best_loss, halve
                rises = torch.zeros_like(rises)
                since, interval = 0, max(interval - shrink, least)
        return torch.where(per_image(fooled, x), adversarial, best), best_loss, fooled

    def _direction(self, grad: Tensor) -> Tensor:
        return grad.sign() if self.norm == "linf" else grad / (_length(grad) + _DIVISION_EPS)

    def _project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Return the nearest point of the ball, clipped; per-image steps keep pgd_step out."""
        if self.norm == "linf":
            return x_adv.clamp(x - self.eps, x + self.eps).clamp(0, 1)
        delta = x_adv - x
        length = _length(delta)
        return (x + delta / (length + _DIVISION_EPS) * length.clamp_max(self.eps)).clamp(0, 1)


def _in_dtype(x: Tensor, grad: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient in the images' dtype: an engine may give a narrower one."""
    return grad.to(x.dtype), logits


def _length(images: Tensor) -> Tensor:
    exact = images.to(torch.promote_types(images.dtype, torch.float32))
    return per_image((exact**2).flatten(1).sum(1).sqrt().to(images.dtype), images)
