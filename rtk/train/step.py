"""make_step: one whole training step on a batch, natural or adversarial."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtk.errors import RtkError

Step = Callable[[Tensor, Tensor], Tensor]


def make_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    attack: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
    *,
    amp: torch.dtype | None = torch.bfloat16,
    graph: Literal["auto"] | bool = "auto",
    label_smoothing: float = 0.0,
) -> Step:
    """Return `step(x, y) -> loss`, which does one optimiser step on a batch.

    Args:
        model: takes images in [0, 1] and returns logits; each module stays in the mode (train or
            eval) that it is in.
        optimizer: over the model's parameters.
        attack: makes the images adversarial first, under the same autocast; None trains naturally.
        amp: autocast dtype, or None for fp32.
        graph: False never captures; "auto" captures on a GPU when shapes are static. This version
            has no capture yet, so "auto" runs eagerly and True is refused.
        label_smoothing: of the cross-entropy.

    Returns:
        A function of x, (N, C, H, W) in [0, 1], and y, (N,) int64, that returns the batch's loss
        before the step: a detached scalar, without synchronising.

    Raises:
        RtkError: for an amp dtype that is not floating, or graph=True.
    """
    if amp is not None and not amp.is_floating_point:
        raise RtkError(f"make_step: amp must be a floating dtype or None, got {amp}")
    if graph is True:
        raise RtkError("make_step: this version cannot capture graphs; use graph='auto' or False")

    def step(x: Tensor, y: Tensor) -> Tensor:
        autocast = (
            contextlib.nullcontext() if amp is None else torch.autocast(x.device.type, dtype=amp)
        )
        with autocast:
            if attack is not None:
                x = attack(model, x, y)
            logits = model(x)
            loss = F.cross_entropy(logits.float(), y, label_smoothing=label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
