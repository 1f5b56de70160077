"""The gradient of a loss in the image: what every gradient attack asks of a model.

`input_gradient` opens a view of the model whose weights are constants, and gives a function that an
attack calls once an iteration. How the gradient is computed is decided here and nowhere else: by
autograd, or by a program of fused operators (`rtk.attacks.fused`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtk.attacks.casts import CastOnce
from rtk.attacks.fused import Route
from rtk.ops import engine

_BatchNorm = nn.modules.batchnorm._BatchNorm

Loss = Callable[[Tensor, Tensor], Tensor]
Gradient = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def local_network(model: nn.Module) -> nn.Module:
    """Return the network inside DistributedDataParallel, or `model` where there is none.

    A forward pass of the wrapper is a collective one: it copies the buffers of rank 0 to all others
    and prepares for gradients of the weights. An attack has no use for either, in any iteration.
    """
    inner = getattr(model, "_orig_mod", model)  # torch.compile(DistributedDataParallel(network))
    return inner.module if isinstance(inner, nn.parallel.DistributedDataParallel) else model


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the batch's mean cross-entropy, in fp32."""
    return F.cross_entropy(logits.float(), y)


@contextlib.contextmanager
def input_gradient(
    model: nn.Module, *, bn_mode: str = "eval", loss: Loss = cross_entropy
) -> Iterator[Gradient]:
    """Attack `model` inside the `with`; afterwards it is as it was.

    Args:
        model: takes images in [0, 1] (it normalises inside) and returns logits.
        bn_mode: batch norm while attacking: "eval" uses the running statistics and leaves them
            alone; "train" uses the batch's, and updates the running ones, as in training.
        loss: of (logits, y), what the attack climbs: a scalar, or one value an image (they are
            summed).

    Yields:
        gradient(x, y) -> (d loss / d x, logits), both detached; x is (N, C, H, W).

    A ResNet-like model in eval mode, on a GPU and under autocast to bf16, runs as a program of
    fused operators (RTK_FUSED_ATTACK=0 turns that off). Its gradient is in bf16, whatever the dtype
    of `x`: that is the precision which the gradients of its activations have either way. A model's
    first gradient is compared with autograd's, and if they differ autograd stays, with a warning.
    """
    casts = CastOnce()
    route = Route(model, loss, autograd_gradient, bn_mode)

    def gradient(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        # Not without autocast: a mode looks at every call, a fifth of a small model's time.
        casting = engine.is_on() and torch.is_autocast_enabled(x.device.type)
        with casts if casting else contextlib.nullcontext():
            fused = route(x, y)
            return autograd_gradient(model, x, y, loss) if fused is None else fused

    with frozen_view(model, bn_mode):
        yield gradient


def autograd_gradient(model: nn.Module, x: Tensor, y: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Return (d loss / d x, logits) of a model as it is, both detached."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x)
        (grad,) = torch.autograd.grad(loss(logits, y).sum(), x)
    return grad, logits.detach()


@contextlib.contextmanager
def frozen_view(model: nn.Module, bn_mode: str) -> Iterator[None]:
    """Make the weights constants: no gradient of them is computed, none is copied.

    Batch norm is in `bn_mode` and everything else in eval; afterwards all is as it was.
    """
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = [module for module in model.modules() if module.training]
    for parameter in learned:
        parameter.requires_grad_(False)
    model.eval()
    if bn_mode == "train":
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.train()
    try:
        yield
    finally:
        model.eval()
        for module in training:
            module.training = True
        for parameter in learned:
            parameter.requires_grad_(True)
