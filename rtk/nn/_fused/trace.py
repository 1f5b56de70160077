"""The trace that a fused program is read from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import fx, nn

from rtk.nn import _trace
from rtk.nn._fused.layers import NotApplicable
from rtk.nn._trace import NotTraceable


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
