"""Seeds of random starts: numbers, or tensors that a CUDA graph reads."""

from __future__ import annotations

import torch
from torch import Tensor

Seed = int | Tensor  # an int in [0, 2**63), or one int64 element on the images' device


def draw_seed() -> int:
    """Return a seed, drawn from torch's global generator on the CPU: nothing waits for the GPU."""
    return int(torch.randint(2**63 - 1, ()))


def following(seed: Seed, count: int) -> Seed:
    """Return the seed `count` after `seed`, e.g. of a restart."""
    return seed + count if isinstance(seed, Tensor) else (seed + count) % 2**63
