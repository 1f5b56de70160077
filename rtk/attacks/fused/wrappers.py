"""The network inside the wrappers that an attack may meet."""

from __future__ import annotations

from torch import nn

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the network inside the wrappers of torch.compile, DDP and mixed precision."""
    from rtk.attacks.precision import CastImages  # which builds on all of this

    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, _WRAPPERS):
            inner = model.module
        if isinstance(model, CastImages):  # a program casts the images by itself
            inner = model.model
        if not isinstance(inner, nn.Module):
            return model
        model = inner
