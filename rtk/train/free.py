"""make_free_step: free adversarial training, where one backward pass moves weights and images.

It is a step of its own and no attack, because it differentiates the weights and the images at
once, in train mode. So it is called like `rtk.train.make_step`, and the training loop takes it
where the attack is `rtk.attacks.Free`; everything else is the loop's.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtk import ops
from rtk.attacks import Free
from rtk.cuda_graph import GraphChoice
from rtk.errors import RtkError
from rtk.train.step import Step

_CARRIED = "free_delta"  # its name in the optimiser's state


def make_free_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    free: Free,
    *,
    amp: torch.dtype | None = torch.bfloat16,
    graph: GraphChoice = "auto",
    label_smoothing: float = 0.0,
) -> Step:
    """Return `step(x, y) -> loss`, which does `free.replays` optimiser steps on a batch.

    Each replay takes one forward and one backward pass at x + delta: the weights' gradients go to
    the optimiser, the images' to `rtk.ops.pgd_step`, which moves delta. Delta starts at 0 and is
    carried from batch to batch (Shafahi et al. 2019, arXiv 1904.12843). It is part of the
    optimiser's state, so that a checkpoint holds it and a stopped run goes on with it.

    Args:
        model: takes images in [0, 1] and returns logits; each module stays in the mode (train or
            eval) that it is in.
        optimizer: over the model's parameters.
        free: norm, radius, step and replays.
        amp: autocast dtype, or None for fp32.
        graph: "auto" and False run eagerly; True is refused.
        label_smoothing: of the cross-entropy.

    Returns:
        A function of x, (N, C, H, W) in [0, 1], and y, (N,) int64, that returns the mean of the
        replays' losses: a detached scalar, without synchronising. N may change from batch to batch.

    Raises:
        RtkError: for an amp dtype that is not floating, or graph=True.
    """
    if amp is not None and not amp.is_floating_point:
        raise RtkError(f"make_free_step: amp must be a floating dtype or None, got {amp}")
    if graph is True:
        raise RtkError("make_free_step: runs eagerly; use graph='auto' or False")
    holder = optimizer.param_groups[0]["params"][0]

    def step(x: Tensor, y: Tensor) -> Tensor:
        x = x.detach()
        count = len(x)
        state = optimizer.state[holder]  # looked up anew: loading a checkpoint replaces it
        carried = _fitting(state.get(_CARRIED), x)
        x_adv = (x + carried[:count]).clamp(0, 1)
        total = torch.zeros((), device=x.device)
        for _ in range(free.replays):
            x_adv.requires_grad_()
            autocast = (
                contextlib.nullcontext()
                if amp is None
                else torch.autocast(x.device.type, dtype=amp)
            )
            with autocast:
                logits = model(x_adv)
                loss = F.cross_entropy(logits.float(), y, label_smoothing=label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            assert x_adv.grad is not None
            x_adv = ops.pgd_step(
                x_adv.detach(),
                x_adv.grad,
                x,
                eps=free.eps,
                step_size=free.resolved_step_size,
                norm=free.norm,
            )
            total += loss.detach()
        state[_CARRIED] = torch.cat([x_adv - x, carried[count:]])
        return total / free.replays

    return step


def _fitting(carried: Tensor | None, x: Tensor) -> Tensor:
    """Return what is carried, with zeros where `x` has images that it has not."""
    if carried is None or carried.shape[1:] != x.shape[1:]:
        return torch.zeros_like(x)
    missing = max(0, len(x) - len(carried))
    return torch.cat([carried, x.new_zeros(missing, *x.shape[1:])])
