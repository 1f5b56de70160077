"""PGD: projected gradient descent on the loss, in the Linf or L2 ball (Madry et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rtk import ops
from rtk.attacks.best import Best
from rtk.attacks.checks import Guard
from rtk.attacks.gradient import Gradient, input_gradient
from rtk.attacks.precision import accepting, loss_to_climb
from rtk.attacks.seeds import Seed, draw_seed, following
from rtk.errors import RtkError, check_choice


@dataclass
class PGD:
    """An attack: `attack(model, x, y)` returns adversarial images.

    It climbs the cross-entropy by `steps` steps of `rtk.ops.pgd_step` (arXiv 1706.06083). Only the
    gradient in the image is computed, and the model is left as it was found.

    Args:
        norm: "linf" or "l2".
        eps: radius in [0, 1] pixel scale, e.g. 8/255; 0 gives the image.
        step_size: length of a step, same scale.
        steps: number of gradient steps; 0 returns the (clipped) start.
        random_start: start at a random point of the ball, drawn from torch's global generator.
        bn_mode: batch norm while attacking: "eval" uses the running statistics and leaves them
            alone; "train" uses the batch's, and updates the running ones, as in training.
        targeted: `y` are the labels to reach; their loss is descended.
        restarts: number of random starts, >= 1; each image keeps the end with the highest loss
            (for a target: the lowest).
        keep_best: keep, for each image, the best iterate of all steps and restarts instead of the
            last; one more forward pass a restart tells how good the last one is.
        early_stop: an image that is misclassified (has reached its target) is kept as it is, and
            computed no longer once half of the batch is. For evaluation: it synchronises in every
            iteration.
        count_nonfinite: count the gradients that are NaN or infinite, for `check_finite`; for
            evaluation (see `rtk.attacks.checks`).

    Raises:
        RtkError: for an unknown norm or mode, a negative number, options that exclude each other.
    """

    norm: str = "linf"
    eps: float = 8 / 255
    step_size: float = 2 / 255
    steps: int = 10
    random_start: bool = True
    bn_mode: str = "eval"
    targeted: bool = field(default=False, kw_only=True)
    restarts: int = field(default=1, kw_only=True)
    keep_best: bool = field(default=False, kw_only=True)
    early_stop: bool = field(default=False, kw_only=True)
    count_nonfinite: bool = field(default=False, kw_only=True, compare=False)
    _guard: Guard = field(default_factory=Guard, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_choice("norm", self.norm, ("linf", "l2"))
        check_choice("bn_mode", self.bn_mode, ("eval", "train"))
        for setting in ("eps", "step_size", "steps"):
            value = getattr(self, setting)
            if not value >= 0:  # a NaN neither
                raise RtkError(f"{name}: {setting} must be >= 0, got {value}")
        if self.restarts < 1:
            raise RtkError(f"{name}: restarts must be >= 1, got {self.restarts}")
        if self.restarts > 1 and not self.random_start:
            raise RtkError(f"{name}: restarts from the same image are all alike; use random_start")
        if self.early_stop and self.bn_mode == "train":
            raise RtkError(
                f"{name}: early_stop makes the batch smaller, which bn_mode='train' would see; "
                "use bn_mode='eval'"
            )

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, seed: Seed | None = None) -> Tensor:
        """Return adversarial images for `model`.

        Args:
            model: takes images in [0, 1] (it normalises inside) and returns logits; where its
                weights have another dtype than `x` (half precision), the images are cast for it.
            x: (N, C, H, W) images in [0, 1], floating; N may be 0.
            y: (N,) int64 labels.
            seed: of the random start, in [0, 2**63), or a one-element int64 tensor; drawn from
                torch's generator where None.

        Returns:
            A new tensor like `x`, within `eps` of it and in [0, 1].

        Raises:
            RtkError: for images that are not floating or labels that are not one an image; on the
                first batch, for images outside [0, 1] or NaN, labels that the model has no class
                for, and gradients that are NaN or infinite. Later batches are not looked at: that
                would synchronise.
        """
        x = x.detach()
        network = accepting(model, x)
        loss = loss_to_climb(network, x, targeted=self.targeted)
        with self._guard.batch(network, x, y, count=self.count_nonfinite) as watch:
            if len(x) == 0:
                return x.clone()
            if seed is None:
                seed = self.draw_seed()
            with input_gradient(network, bn_mode=self.bn_mode, loss=loss) as gradient:
                return self._search(network, watch(gradient), x, y, seed)

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold it: early stopping looks at values."""
        return not self.early_stop

    def draw_seed(self) -> int | None:
        """Return the seed of one call, drawn from torch's global generator; None without a start.

        A CUDA graph draws it before each replay and gives it as a tensor.
        """
        return draw_seed() if self.random_start else None

    def check_finite(self) -> None:
        """Raise an RtkError if `count_nonfinite` counted any since the last call; synchronises."""
        self._guard.check()

    def _search(
        self,
        model: nn.Module,
        gradient: Gradient,
        x: Tensor,
        y: Tensor,
        seed: Seed | None,
    ) -> Tensor:
        choosing = self.restarts > 1 or self.keep_best or self.early_stop
        best = Best(x, y, self.targeted, self.early_stop) if choosing else None
        for restart in range(self.restarts):
            x_adv = self._start(x, seed, restart)
            for _ in range(self.steps):
                grad, logits = gradient(x_adv, y)
                if best is not None:
                    best.offer(x_adv, logits, eligible=self.keep_best)
                    if self.early_stop and (rest := best.drop_finished()) is not None:
                        x, y, x_adv, grad = x[rest], y[rest], x_adv[rest], grad[rest]
                        if len(x) == 0:
                            return best.images()
                x_adv = ops.pgd_step(
                    x_adv, grad, x, eps=self.eps, step_size=self.step_size, norm=self.norm
                )
            if best is not None:
                with torch.no_grad():
                    best.offer(x_adv, model(x_adv), eligible=True)
                if self.early_stop and (rest := best.drop_finished()) is not None:
                    x, y = x[rest], y[rest]
                    if len(x) == 0:
                        return best.images()
        return x_adv if best is None else best.images()

    def _start(self, x: Tensor, seed: Seed | None, restart: int) -> Tensor:
        if not self.random_start or seed is None:
            return x.clamp(0, 1) if self.steps == 0 else x
        return ops.pgd_init(x, eps=self.eps, norm=self.norm, seed=following(seed, restart))
