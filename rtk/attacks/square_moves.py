"""The starts and moves of the Square attack in the Linf and in the L2 ball.

All random numbers come from one generator on the CPU, in the order in which the authors' code
draws them. A query's square lies at the same place in every image; its signs are each image's own
in L2 and the batch's in Linf, as there.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from rtk.attacks.best import per_image

_DIVISION_EPS = 1e-12


class Moves:
    """What the norms share: the draws and the size of a square."""

    least = 1  # pixels of a square's side

    def __init__(self, eps: float, generator: Generator) -> None:
        self.eps = eps
        self.generator = generator

    def side(self, x: Tensor, share: float) -> int:
        """Return the side of a square that covers `share` of the pixels and fits."""
        height, width = x.shape[2:]
        return min(max(round(math.sqrt(share * height * width)), self.least), height, width)

    def signs(self, *shape: int, like: Tensor) -> Tensor:
        """Return random -1 and 1."""
        draw = torch.rand(shape, generator=self.generator)
        return (2 * draw - 1).sign().to(like)

    def window(self, x: Tensor, side: int) -> tuple[slice, slice]:
        """Return the rows and columns of a random square."""
        top, left = (
            int(torch.rand((1,), generator=self.generator) * (size - side)) for size in x.shape[2:]
        )
        return slice(top, top + side), slice(left, left + side)


class LinfMoves(Moves):
    """Vertical stripes to start with; a square is moved by two radii, to the other side."""

    def start(self, x: Tensor) -> Tensor:
        """Return x plus or minus eps, column by column, clipped."""
        signs = self.signs(len(x), x.shape[1], 1, x.shape[3], like=x)
        return (x + self.eps * signs).clamp(0, 1)

    def propose(self, x_adv: Tensor, x: Tensor, share: float) -> Tensor:
        """Return `x_adv` with one square moved, in the ball around `x` and in [0, 1]."""
        rows, columns = self.window(x, self.side(x, share))
        delta = torch.zeros_like(x[0])
        delta[:, rows, columns] = 2 * self.eps * self.signs(x.shape[1], 1, 1, like=x)
        return (x_adv + delta).clamp(x - self.eps, x + self.eps).clamp(0, 1)


class L2Moves(Moves):
    """Bumps to start with; a move takes the norm of one square away and gives it to another."""

    least = 3

    def start(self, x: Tensor) -> Tensor:
        """Return `x` plus a grid of bumps of norm eps, clipped."""
        height, width = x.shape[2:]
        side = height // 5
        margin = (height - 5 * side) // 2
        delta = torch.zeros_like(x)
        for row in range(height // side):
            for column in range(width // side):
                top, left = margin + row * side, margin + column * side
                place = delta[:, :, top : top + side, left : left + side]
                bump = self._bump(side, x)[: place.shape[2], : place.shape[3]]
                place += bump * self.signs(len(x), x.shape[1], 1, 1, like=x)
        return (x + _unit(delta) * self.eps).clamp(0, 1)

    def propose(self, x_adv: Tensor, x: Tensor, share: float) -> Tensor:
        """Return `x_adv` with the norm of one square moved into another, of norm eps, clipped."""
        delta = x_adv - x
        side = self.side(x, share)
        side = min(side + (side % 2 == 0), *x.shape[2:])
        into, away = self.window(x, side), self.window(x, side)
        here, there = delta[:, :, *into], delta[:, :, *away]

        touched = torch.zeros_like(delta[:1, :1])
        touched[:, :, *into] = 1
        touched[:, :, *away] = 1
        left = (self.eps**2 - _norm(delta) ** 2).clamp_min(0) / x.shape[1]
        norm = (left + _norm(delta * touched) ** 2).sqrt()

        bump = self._bump(side, x) * self.signs(len(x), x.shape[1], 1, 1, like=x)
        new = bump + here / (_plane_norm(here) + _DIVISION_EPS)
        new = new / (_plane_norm(new) + _DIVISION_EPS) * norm
        there.zero_()
        delta[:, :, *into] = new
        return (x + _unit(delta) * self.eps).clamp(0, 1)

    def _bump(self, side: int, like: Tensor) -> Tensor:
        """Return (side, side) of norm 1: a hill beside a valley, one above or beside the other."""
        top = side // 2
        bump = torch.cat([_hill(top, side), -_hill(side - top, side)])
        bump /= (bump**2).sum().sqrt()
        if torch.rand([1], generator=self.generator) > 0.5:
            bump = bump.T
        return bump.to(like)


def _hill(height: int, width: int) -> Tensor:
    """Return (height, width) of norm 1 that falls from its middle: rectangles of 1/k^2 added."""
    hill = torch.zeros(height, width)
    row, column = height // 2, width // 2
    for k in range(max(height // 2, width // 2) + 1):
        rows = slice(max(row, 0), min(row + 2 * k + 1, height))
        columns = slice(max(column, 0), min(column + 2 * k + 1, width))
        hill[rows, columns] += 1 / (k + 1) ** 2
        row, column = row - 1, column - 1
    return hill / (hill**2).sum().sqrt()  # empty where the height is 0


def _norm(images: Tensor) -> Tensor:
    return per_image((images**2).flatten(1).sum(1).sqrt(), images)


def _plane_norm(images: Tensor) -> Tensor:
    return (images**2).sum((2, 3), keepdim=True).sqrt()


def _unit(images: Tensor) -> Tensor:
    return images / (_norm(images) + _DIVISION_EPS)
