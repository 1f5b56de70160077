"""Memory formats and broadcasting, decided in one place for op and fake alike."""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format(tensor: Tensor) -> torch.memory_format:
    """Return channels_last for a 4-D tensor that is dense only that way, else contiguous."""
    if (
        tensor.dim() == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    ):
        return torch.channels_last
    return torch.contiguous_format


def broadcasts_to(shape: torch.Size, target: torch.Size) -> bool:
    """Whether a tensor of `shape` expands to `target`."""
    if len(shape) > len(target):
        return False
    tail = target[len(target) - len(shape) :]
    return all(size in (1, wanted) for size, wanted in zip(shape, tail, strict=True))


def sum_to(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Sum `tensor` over the dimensions along which `shape` was broadcast."""
    extra = tensor.dim() - len(shape)
    dims = [*range(extra)]
    dims += [
        extra + i for i, size in enumerate(shape) if size == 1 and tensor.shape[extra + i] != 1
    ]
    return tensor.sum(dims).reshape(shape) if dims else tensor.reshape(shape)
