"""Square attack: a random search for squares, which needs logits only (Andriushchenko et al. 2020).

It finds what gradient attacks miss where gradients are masked, so it belongs into an evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn

from rtk.attacks.best import per_image
from rtk.attacks.checks import Guard
from rtk.attacks.gradient import frozen_view
from rtk.attacks.precision import accepting
from rtk.attacks.seeds import draw_seed
from rtk.attacks.square_moves import L2Moves, LinfMoves
from rtk.errors import RtkError, check_choice

_LOOK_EVERY = 20  # queries between two looks at how many images are left: each look synchronises

# (queries of 10000, divisor of p): the share of pixels a square covers falls on this schedule.
_SCHEDULE = (
    (10, 1),
    (50, 2),
    (200, 4),
    (500, 8),
    (1000, 16),
    (2000, 32),
    (4000, 64),
    (6000, 128),
    (8000, 256),
)


@dataclass
class Square:
    """A score-based black-box attack: `attack(model, x, y)` (arXiv 1912.00049).

    Each query moves one square of every image and keeps what lowers the margin between the label's
    logit and the highest other one; an image whose margin is not positive any more is done.

    Args:
        norm: "linf" or "l2"; l2 needs images of 5 pixels and more.
        eps: radius in [0, 1] pixel scale, e.g. 8/255.
        queries: of an image, >= 0, after the start; AutoAttack takes 5000.
        p: share of the pixels that the first squares cover, in (0, 1]; falls as the paper says,
            rescaled from 10000 to `queries`.

    Raises:
        RtkError: for an unknown norm or a number out of range.
    """

    norm: str = "linf"
    eps: float = 8 / 255
    queries: int = 5000
    p: float = 0.8
    _guard: Guard = field(default_factory=Guard, init=False, repr=False, compare=False)

    capturable = False  # it looks at how many images are left, and draws on the CPU

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, ("linf", "l2"))
        for name in ("eps", "queries"):
            if not getattr(self, name) >= 0:
                raise RtkError(f"Square: {name} must be >= 0, got {getattr(self, name)}")
        if not 0 < self.p <= 1:
            raise RtkError(f"Square: p must be a share in (0, 1], got {self.p}")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, seed: int | None = None) -> Tensor:
        """Return adversarial images for `model`, which is only asked for logits.

        Args:
            model: takes images in [0, 1] (it normalises inside) and returns logits.
            x: (N, C, H, W) images in [0, 1], floating; N may be 0.
            y: (N,) int64 labels.
            seed: of the search, in [0, 2**63): one seed finds the same squares on every device;
                drawn from torch's generator where None.

        Returns:
            A new tensor like `x`, within `eps` of it and in [0, 1].

        Raises:
            RtkError: for images and labels as PGD does; for l2 and images below 5 pixels.
        """
        x = x.detach()
        network = accepting(model, x)
        with self._guard.batch(network, x, y):
            if len(x) == 0:
                return x.clone()
            if x.dim() != 4 or (self.norm == "l2" and min(x.shape[2:]) < 5):
                raise RtkError(
                    f"Square: images must be (N, C, H, W), for l2 of 5 pixels and more, got "
                    f"{tuple(x.shape)}"
                )
            if seed is None:
                seed = draw_seed()
            generator = Generator().manual_seed(seed)  # on the CPU: nothing waits for its numbers
            with torch.no_grad(), frozen_view(network, "eval"):
                return self._search(network, x, y, generator)

    def _search(
        self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, generator: Generator
    ) -> Tensor:
        moves = (LinfMoves if self.norm == "linf" else L2Moves)(self.eps, generator)
        out = x_adv = moves.start(x)
        margin = _margin(model(x_adv), y)
        at = torch.arange(len(x), device=x.device)
        for query in range(self.queries):
            if query % _LOOK_EVERY == 0:
                rest = (margin > 0).nonzero().squeeze(1)
                if len(rest) == 0:
                    break
                if 2 * len(rest) <= len(margin):
                    out = out.index_copy(0, at, x_adv)
                    x, y, x_adv, margin, at = x[rest], y[rest], x_adv[rest], margin[rest], at[rest]
            x_new = moves.propose(x_adv, x, self._share(query))
            new = _margin(model(x_new), y)
            take = (new < margin) & (margin > 0)
            x_adv = torch.where(per_image(take, x), x_new, x_adv)
            margin = torch.where(take, new, margin)
        return out.index_copy(0, at, x_adv)

    def _share(self, query: int) -> float:
        """Return the share of the pixels that a square covers in a query."""
        of_10000 = int(query / self.queries * 10000)
        divisor = next((d for until, d in _SCHEDULE if of_10000 <= until), 512)
        return self.p / divisor


def _margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return, (N,) in fp32, the label's logit minus the highest other: not positive is wrong."""
    logits = logits.float()
    label = y.unsqueeze(1)
    others = logits.scatter(1, label, -math.inf)
    return logits.gather(1, label).squeeze(1) - others.amax(1)
