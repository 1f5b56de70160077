"""Whether Triton can run, asked without importing it: that takes longer than the rest of rtk."""

from __future__ import annotations

import importlib.util

from torch import Tensor

_INSTALLED = importlib.util.find_spec("triton") is not None


def why_not_triton(*tensors: Tensor) -> str | None:
    """Return why Triton kernels cannot take these tensors, or None where they can."""
    if not _INSTALLED:
        return "Triton is not installed; run: pip install triton"
    for tensor in tensors:
        if tensor.device.type != "cuda":
            return f"the tensors are on {tensor.device}, not on a GPU"
    return None
