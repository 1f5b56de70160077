"""Free adversarial training: the settings of it (Shafahi et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from torch import Tensor, nn

from rtk.errors import RtkError, check_choice


@dataclass(frozen=True)
class Free:
    """Each batch is replayed, and each backward pass moves the weights and the images.

    So it is a training step, `rtk.train.make_free_step`, and no attack on a fixed model: calling
    it raises. The perturbation is carried from batch to batch (arXiv 1904.12843). As every batch
    is replayed m times, train for 1/m of the epochs.

    Args:
        norm: "linf" or "l2".
        eps: radius in [0, 1] pixel scale, e.g. 8/255.
        step_size: length of the image's step a replay; None is eps.
        replays: m, passes over each batch, >= 1.

    Raises:
        RtkError: for an unknown norm, a negative number or no replays.
    """

    norm: str = "linf"
    eps: float = 8 / 255
    step_size: float | None = None
    replays: int = 4

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, ("linf", "l2"))
        for name, least in (("eps", 0), ("resolved_step_size", 0), ("replays", 1)):
            value = getattr(self, name)
            if not value >= least:
                shown = name.removeprefix("resolved_")
                raise RtkError(f"Free: {shown} must be >= {least}, got {value}")

    @property
    def resolved_step_size(self) -> float:
        """`step_size`, or eps where it is None."""
        return self.eps if self.step_size is None else self.step_size

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> NoReturn:
        """Raise an RtkError: there is nothing to attack with."""
        raise RtkError(
            "free is a way of training, not an attack: train with rtk.train.make_free_step or "
            "`rtk pretrain --attack.name free`, and measure with pgd or apgd-ce"
        )
