"""Mean intersection over union of a segmentation, from a confusion matrix that stays on the device.

N H W: images, C: classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rtk.errors import RtkError


class ConfusionMatrix:
    """Counts which class pixels have against which class they were given.

    `update` never waits for the device, so that it can follow every batch.

    Args:
        num_classes: C, >= 1.
        ignore: the label of pixels that do not count, outside 0..C-1; 255 in PASCAL VOC.
        device: where the labels will be.
    """

    def __init__(
        self, num_classes: int, *, ignore: int = 255, device: torch.device | str = "cpu"
    ) -> None:
        if num_classes < 1 or 0 <= ignore < num_classes:
            raise RtkError(
                "ConfusionMatrix: expected at least 1 class and a label to ignore that is none of "
                f"them, got {num_classes} and {ignore}"
            )
        self.num_classes = num_classes
        self.ignore = ignore
        # Behind the C * C cells one for pixels that are ignored and one for labels of no class.
        self._cells = torch.zeros(num_classes**2 + 2, dtype=torch.int64, device=device)

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            predicted: (N, C, H, W) floating logits, or the classes themselves as in `labels`.
            labels: (N, H, W), or of any other shape, whole numbers in 0..C-1 or `ignore`.

        Raises:
            RtkError: where the shapes do not fit.
        """
        if predicted.is_floating_point():
            if predicted.dim() < 2 or predicted.shape[1] != self.num_classes:
                raise RtkError(
                    f"ConfusionMatrix: expected logits (N, {self.num_classes}, ...), "
                    f"got {tuple(predicted.shape)}"
                )
            predicted = predicted.argmax(1)
        if predicted.shape != labels.shape:
            raise RtkError(
                f"ConfusionMatrix: predictions are {tuple(predicted.shape)} and labels "
                f"{tuple(labels.shape)}; resize the logits to the size of the labels"
            )
        c = self.num_classes
        predicted, labels = predicted.flatten().long(), labels.flatten().long()
        cell = labels * c + predicted
        known = (labels >= 0) & (labels < c) & (predicted >= 0) & (predicted < c)
        cell = torch.where(known, cell, c * c + 1)
        cell = torch.where(labels == self.ignore, c * c, cell)
        # scatter_add and not bincount, which waits to know the largest cell.
        self._cells.scatter_add_(0, cell, torch.ones_like(cell))

    @property
    def counts(self) -> Tensor:
        """(C, C) int64 on the device: pixels by true class (row) and given class (column).

        Raises an RtkError where a label or a prediction was no class.
        """
        wrong = int(self._cells[-1])
        if wrong:
            raise RtkError(
                f"ConfusionMatrix: {wrong} pixels have a label or a prediction outside "
                f"0..{self.num_classes - 1} (to ignore pixels, label them {self.ignore})"
            )
        return self._cells[:-2].view(self.num_classes, self.num_classes)

    def iou(self) -> Tensor:
        """Return each class's intersection over union, (C,) float64 on the CPU.

        NaN for a class that neither a label nor a prediction has.
        """
        counts = self.counts.cpu().double()
        both = counts.diagonal()
        return both / (counts.sum(0) + counts.sum(1) - both)

    def mean_iou(self) -> float:
        """Return the mean of `iou` over the classes that occur, as torchmetrics' macro average.

        Raises an RtkError where no pixel counted.
        """
        iou = self.iou()
        occurring = ~iou.isnan()
        if not occurring.any():
            raise RtkError(
                "ConfusionMatrix: no pixel has a class, so there is no mean intersection over "
                f"union; are all labels {self.ignore}?"
            )
        return iou[occurring].mean().item()
