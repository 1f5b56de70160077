"""The trace that a fused program is read from, and the network inside its wrappers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import fx, nn

from rtk.attacks.fused.layers import NotApplicable
from rtk.nn import _trace
from rtk.nn._trace import NotTraceable

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


@contextlib.contextmanager
def trace(model: nn.Module) -> Iterator[fx.GraphModule]:
    """Trace a network in eval mode; the graph's modules are the network's own.

    Raises:
        NotApplicable: if it is not in eval mode, has hooks, or cannot be traced.
    """
    with contextlib.ExitStack() as stack:
        try:
            traced = stack.enter_context(_trace.trace(model))
        except NotTraceable as error:
            raise NotApplicable(str(error)) from error
        yield traced
