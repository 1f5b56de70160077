"""The engine off: the same work by PyTorch alone, to measure what the engine saves.

Off, every op runs its plain reference, masked convolutions are `F.conv2d(x, w * m)`, attacks
differentiate by autograd, and nothing is captured in a CUDA graph: what one writes by hand, with
the same seeds, the same precision and memory layout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rtk.ops._registry import backend

_on = True


def is_on() -> bool:
    """Whether rtk's own paths may be taken."""
    return _on


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Turn the engine off inside the `with`, in the whole process (backward included).

    What was captured or prepared before keeps its own path: make models and steps inside.
    """
    global _on
    previous, _on = _on, False
    try:
        with backend("reference"):
            yield
    finally:
        _on = previous
