"""The compiled module, or the reason why it is not there.

C++ knows nothing of torch: tensors go to it as a data pointer and a dtype number.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

_C: Any = None
missing_reason: str | None = None
try:
    _C = importlib.import_module("rtk._C")
except ImportError as error:
    missing_reason = f"not built, or it does not load ({error}); run: pip install -e ."

DTYPES: dict[torch.dtype, int] = {}
if _C is not None:
    DTYPES = {
        torch.float32: _C.f32,
        torch.float64: _C.f64,
        torch.bfloat16: _C.bf16,
        torch.float16: _C.f16,
        torch.uint8: _C.u8,
        torch.bool: _C.b1,
    }


def why_not_cpu(*tensors: Tensor) -> str | None:
    """Return why the C++ CPU code cannot take these tensors, or None where it can."""
    if _C is None:
        return "rtk._C is missing; see `rtk doctor`"
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"the tensors are on {tensor.device}, not on the CPU"
    return None


def why_not_cuda(*tensors: Tensor) -> str | None:
    """Return why the CUDA C++ code cannot take these tensors, or None where it can."""
    if _C is None:
        return "rtk._C is missing; see `rtk doctor`"
    if not _C.cuda_architectures:
        return f"rtk._C was built without CUDA ({_C.cuda_status})"
    for tensor in tensors:
        if tensor.device.type != "cuda":
            return f"the tensors are on {tensor.device}, not on a GPU"
    return None


def why_not_dtype(tensor: Tensor, name: str, *allowed: torch.dtype) -> str | None:
    """Return why `tensor`'s dtype does not do, or None where it does."""
    if tensor.dtype in allowed:
        return None
    return f"{name} is {tensor.dtype}, it takes {', '.join(map(str, allowed))}"
