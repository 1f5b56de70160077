"""What every network has: its spec, normalisation inside, pooled features and a head by name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from rtk.errors import RtkError
from rtk.models.spec import ModelSpec
from rtk.registry import Registry


class Classifier(nn.Module):
    """A network that takes images in [0, 1] and normalises them itself.

    Attacks and their radius then live in pixel space, whatever the network was trained with.
    Mean and std are part of `spec`, not of the state dict, so the keys stay those of torchvision.
    """

    head_name = "fc"
    spec: ModelSpec
    mean: Tensor
    std: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.follow(spec)

    def follow(self, spec: ModelSpec) -> None:
        """Become the network of `spec`, which differs in its normaliser at most."""
        self.spec = spec
        shape = (1, 3, 1, 1)
        self.register_buffer("mean", torch.tensor(spec.mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(shape), persistent=False)

    def normalise(self, x: Tensor) -> Tensor:
        """Return (x - mean) / std."""
        return (x - self.mean) / self.std

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the pooled features (N, F) of images (N, 3, H, W), float in [0, 1]."""
        raise NotImplementedError


Builder = Callable[[ModelSpec], Classifier]
MODELS: Registry[Builder] = Registry("model")


def replace_head(
    model: Classifier, num_classes: int, *, generator: Generator | None = None
) -> Classifier:
    """Put a new linear head on `model`, in place, and record it in `model.spec`.

    Weight and bias are uniform in +-1/sqrt(F), nn.Linear's own start, drawn on the CPU so that a
    seed means the same on every device.

    Args:
        model: a network of `rtk.models.create`.
        num_classes: outputs of the new head, >= 1.
        generator: a CPU generator; None draws from torch's global random state.

    Returns:
        The same `model`.

    Raises:
        RtkError: where there is no linear head or num_classes is below 1.
    """
    if num_classes < 1:
        raise RtkError(f"replace_head: expected num_classes of at least 1, got {num_classes}")
    old = dict(model.named_modules()).get(model.head_name)
    if not isinstance(old, nn.Linear):
        raise RtkError(
            f"replace_head: {model.head_name} is {type(old).__name__}, expected a linear layer"
        )
    weight = torch.empty(num_classes, old.in_features)
    bias = torch.empty(num_classes)
    bound = 1 / math.sqrt(old.in_features)
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
    nn.init.uniform_(bias, -bound, bound, generator=generator)
    # Built on meta: an nn.Linear made elsewhere would draw from the global random state itself.
    head = nn.Linear(old.in_features, num_classes, device="meta")
    head.weight = nn.Parameter(weight.to(old.weight))
    head.bias = nn.Parameter(bias.to(old.weight))
    parent, _, child = model.head_name.rpartition(".")
    setattr(model.get_submodule(parent), child, head.train(model.training))
    model.spec = dataclasses.replace(model.spec, num_classes=num_classes)
    return model
