"""What an attack looks at before and after it runs, and how often.

A look at a value waits for the GPU, so it has no place in a training loop or a CUDA graph:

- Shapes and dtypes are looked at on every batch; they cost nothing.
- On an attack's first batch also the values: images in [0, 1], labels that have a class, and the
  gradients of all iterations, gathered in flags that are read once, after the last.
- Later batches of a training are not looked at. A model whose image gradients become NaN there
  gets NaN weights from the same backward pass, which the training loop looks for.
- While evaluating nothing else would notice: the sign of a NaN is 0, so a broken gradient leaves
  the image as it is and the model looks robust. There gradients that are not finite are counted on
  the device, by kernels that a graph can hold, and the count is read once, after the last batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rtk.attacks.gradient import Gradient, frozen_view
from rtk.errors import RtkError

Watch = Callable[[Gradient], Gradient]

_REMEDY = (
    "look for NaN weights, a square root or norm at 0 or a division in the model, and compute in "
    "fp32 (--train.amp none, model.float())"
)


class Guard:
    """The looks of one attack; it remembers that the first batch is over."""

    def __init__(self) -> None:
        self._first = True
        # How many gradients were not finite. By device, as a CUDA graph goes on counting in the
        # memory that it was captured with.
        self._broken: dict[torch.device, Tensor] = {}

    @contextmanager
    def batch(
        self, model: nn.Module, x: Tensor, y: Tensor, *, count: bool = False
    ) -> Iterator[Watch]:
        """Look at a batch, and at the gradients that are taken inside the `with`.

        Args:
            model: what is attacked.
            x: (N, ...) images.
            y: (N,) labels.
            count: count the gradients that are not finite, for `check`.

        Yields:
            watch(gradient) -> gradient: the function to attack with, looked at or not.

        Raises:
            RtkError: for what is wrong with the batch; after the `with`, on the first batch, for
                gradients that were not finite.
        """
        check_batch(x, y)
        first = self._first and len(x) > 0
        if first:
            check_images(x)
            check_classes(model, x, y)
        if count and x.device not in self._broken:
            self._broken[x.device] = torch.zeros((), dtype=torch.int64, device=x.device)
        finite: list[Tensor] = []

        def watch(gradient: Gradient) -> Gradient:
            def watched(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
                grad, logits = gradient(x, y)
                flag = grad.isfinite().all()
                if first:
                    finite.append(flag)
                elif count:
                    self._broken[flag.device] += ~flag
                return grad, logits

            return watched if first or count else gradient

        yield watch
        if finite:
            check_gradients(finite)
        self._first = self._first and not first

    def check(self) -> None:
        """Raise an RtkError if gradients that were not finite were counted; synchronises."""
        broken = sum(int(counted) for counted in self._broken.values())
        for counted in self._broken.values():
            counted.zero_()
        if broken:
            raise RtkError(
                f"attack: {broken} gradients of the loss in the images were NaN or infinite, so "
                f"the model is not as robust as it looks; {_REMEDY}"
            )


def check_batch(x: Tensor, y: Tensor) -> None:
    """Raise an RtkError unless `x` is a floating batch and `y` has a label for each image."""
    if not x.is_floating_point():
        raise RtkError(f"attack: images must be floating, in [0, 1], got {x.dtype}")
    if y.dtype != torch.int64 or y.shape != x.shape[:1]:
        raise RtkError(
            f"attack: labels must be int64 ({len(x)},), one an image, got {y.dtype} "
            f"{tuple(y.shape)}"
        )


def check_images(x: Tensor) -> None:
    """Raise an RtkError unless all pixels are finite and in [0, 1]; synchronises."""
    if x.numel() == 0:
        return
    low, high = x.aminmax()
    if not (low >= 0 and high <= 1):  # a NaN fails both
        raise RtkError(
            f"attack: images must lie in [0, 1] and be finite, got {low.item():.4g} to "
            f"{high.item():.4g}; give pixels / 255 and let the model normalise"
        )


def check_labels(y: Tensor, logits: Tensor) -> None:
    """Raise an RtkError unless every label has a logit; synchronises."""
    classes = logits.shape[1]
    if y.numel() and not (y.min() >= 0 and y.max() < classes):
        raise RtkError(
            f"labels must be in [0, {classes}), the model's classes, got {y.min().item()} to "
            f"{y.max().item()}"
        )


def check_classes(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Raise an RtkError unless `model` has a logit for every label; runs it on one image.

    Before any loss is computed: on a GPU a label that is out of range would end the process.
    """
    if len(x):
        with torch.no_grad(), frozen_view(model, "eval"):
            check_labels(y, model(x[:1]))


def check_gradients(finite: list[Tensor]) -> None:
    """Raise an RtkError unless all flags, one an iteration, are true; synchronises once."""
    flags = torch.stack(finite)
    if flags.all():
        return
    first = int((~flags).int().argmax())
    raise RtkError(
        f"attack: the loss's gradient in the images is NaN or infinite in iteration {first + 1} "
        f"of {len(finite)}; {_REMEDY}"
    )
