"""Images and models of different precision: who is cast, and which loss survives it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtk.attacks.gradient import Loss, cross_entropy, local_network


class CastImages(nn.Module):
    """A model behind a cast of the images to `dtype`; gradients come back in the images' own."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.to(self.dtype))


def weights_dtype(model: nn.Module) -> torch.dtype | None:
    """Return the dtype of the first floating parameter; None where there is none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def accepting(model: nn.Module, x: Tensor) -> nn.Module:
    """Return what to attack: `model`, behind a cast where its weights have another dtype than `x`.

    Of DistributedDataParallel the network inside is attacked, so ranks need not agree on it. The
    images are iterated, projected and returned in their own dtype, fp32 for a model in half
    precision: in bf16 a step of 2/255 would be lost in the rounding.
    """
    model = local_network(model)
    dtype = weights_dtype(model)
    return model if dtype in (None, x.dtype) else CastImages(model, dtype)


def image_losses(logits: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy of each image, (N,) in fp32."""
    return F.cross_entropy(logits.float(), y, reduction="none")


def negative_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return minus the batch's mean cross-entropy, in fp32: climbed, it leads to `y`."""
    return -cross_entropy(logits, y)


def negative_image_losses(logits: Tensor, y: Tensor) -> Tensor:
    """Return minus the cross-entropy of each image, (N,) in fp32."""
    return -image_losses(logits, y)


def loss_to_climb(model: nn.Module, x: Tensor, *, targeted: bool = False) -> Loss:
    """Return the loss an attack on `model` climbs: always one of this module's or `cross_entropy`.

    The mean over the batch, as in training. In fp16 the sum instead: a mean divides the gradients
    by N before they are rounded, and most of them would become 0.
    """
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if torch.float16 in (weights_dtype(model), autocast):
        return negative_image_losses if targeted else image_losses
    return negative_cross_entropy if targeted else cross_entropy
