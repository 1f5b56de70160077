"""The best adversarial image so far, for each image of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from rtk.attacks.precision import image_losses, negative_image_losses


def per_image(flags: Tensor, images: Tensor) -> Tensor:
    """Return `flags`, (N,), shaped to broadcast over `images`, (N, ...)."""
    return flags.view(-1, *[1] * (images.dim() - 1))


class Best:
    """Keeps, of all iterates that are offered, the one with the highest loss, image by image.

    Masks decide, so nothing synchronises but `drop_finished`.

    Args:
        x: (N, ...) the images, before any is offered.
        y: (N,) int64 labels, or targets.
        targeted: the lowest loss of `y` is best, and reaching `y` is success.
        stop: a success finishes its image: it is kept whatever comes later.
    """

    def __init__(self, x: Tensor, y: Tensor, targeted: bool, stop: bool) -> None:
        self._losses = negative_image_losses if targeted else image_losses
        self._y, self._targeted, self._stop = y, targeted, stop
        self._all = x.clamp(0, 1)  # what an image keeps if every iterate's loss is NaN
        self._at: Tensor | None = None  # which of all are still computed; None is all of them
        self._kept = self._all
        self._loss = torch.full((len(x),), -torch.inf, device=x.device)
        self._finished = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def offer(self, x_adv: Tensor, logits: Tensor, *, eligible: bool) -> None:
        """Take the images of `x_adv` that are better than what is kept.

        Args:
            x_adv: (n, ...) iterates of the images that are still computed.
            logits: (n, classes) of them.
            eligible: whether a higher loss is enough; else only a success that finishes is.
        """
        loss = self._losses(logits, self._y)
        take = loss > self._loss if eligible else torch.zeros_like(self._finished)
        if self._stop:
            success = logits.argmax(1) == self._y if self._targeted else logits.argmax(1) != self._y
            take = (take | success) & ~self._finished
            self._finished = self._finished | success
        self._kept = torch.where(per_image(take, x_adv), x_adv, self._kept)
        self._loss = torch.where(take, loss, self._loss)

    def drop_finished(self) -> Tensor | None:
        """Stop computing finished images, once they are half of those that are computed.

        In halves, so that a batch takes few different sizes: each new one costs cuDNN a search.

        Returns:
            (m,) int64, which of the n images go on (possibly none), or None if all do; in the
            latter case nothing changes. Synchronises.
        """
        rest = (~self._finished).nonzero().squeeze(1)
        if 2 * len(rest) > len(self._finished):
            return None
        self._store()
        self._at = rest if self._at is None else self._at[rest]
        self._y, self._kept, self._loss = self._y[rest], self._kept[rest], self._loss[rest]
        self._finished = self._finished[rest]
        return rest

    def images(self) -> Tensor:
        """Return (N, ...) the best of every image."""
        self._store()
        return self._all

    def _store(self) -> None:
        self._all = (
            self._kept if self._at is None else self._all.index_copy(0, self._at, self._kept)
        )
