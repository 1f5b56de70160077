"""Random numbers that are a function of a seed and a pixel's index, the same on every machine.

The numbers come from Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1,
2, 3"): word i % 4 of the block with counter i // 4 belongs to pixel i of the batch in N, C, H, W
order. So a seed gives the same noise whatever the memory format, the device or the thread count.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rtk.ops._registry import require

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def split_seed(op: str, seed: int | Tensor) -> tuple[int, Tensor | None]:
    """Return what a schema takes, (seed, None) or (0, tensor); check the range of a plain seed."""
    if isinstance(seed, Tensor):
        return 0, seed
    require(0 <= seed < 2**63, "%s: seed must be in [0, 2**63), got %s", op, seed)
    return seed, None


def check_seed(op: str, x: Tensor, seed: Tensor | None) -> None:
    """Raise an RtkError unless `seed` is one int64 beside `x`, or None."""
    if seed is None:
        return
    require(
        seed.dtype == torch.int64 and seed.numel() == 1,
        "%s: a seed in memory must be one int64, got %s of %s; "
        "use torch.tensor([seed], device=x.device)",
        op,
        tuple(seed.shape),
        seed.dtype,
    )
    require(
        seed.device == x.device,
        "%s: seed is on %s and x on %s; move one with .to()",
        op,
        seed.device,
        x.device,
    )


def seed_on_host(seed: int, seed_tensor: Tensor | None) -> int:
    """Return the seed as the unsigned number that C++ takes."""
    return seed if seed_tensor is None else int(seed_tensor.item()) & (_WORD << 32 | _WORD)


def philox(count: int, seed: int | Tensor, stream: int, device: torch.device) -> Tensor:
    """Return words 0..count-1 of Philox4x32-10 under `seed` as int64 in [0, 2**32).

    `stream` is the third counter word: streams do not overlap. A seed in memory is not read by the
    host.
    """
    if isinstance(seed, Tensor):
        seed = seed.reshape(())
    blocks = torch.arange((count + 3) // 4, dtype=torch.int64, device=device)
    c0, c1 = blocks & _WORD, blocks >> 32
    c2, c3 = torch.full_like(blocks, stream), torch.zeros_like(blocks)
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        # int64 multiplication wraps; its upper half is right once the sign's copies are cut off.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> 32 & _WORD) ^ c1 ^ k0,
            product1 & _WORD,
            (product0 >> 32 & _WORD) ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return torch.stack([c0, c1, c2, c3], dim=1).reshape(-1)[:count]


def uniform(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Map 32-bit words to [0, 1) on a grid of 2**-24, which fp32 holds exactly."""
    return (words >> 8).to(dtype) * 2.0**-24


def standard_normal(count: int, seed: int | Tensor, device: torch.device) -> Tensor:
    """Return normals 0..count-1 under `seed`, fp64.

    Box and Muller 1958: sqrt(-2 ln u1) cos(2 pi u2), with u1 from stream 0 and u2 from stream 1.
    """
    u1 = uniform(philox(count, seed, 0, device), torch.float64) + 2.0**-24  # in (0, 1]
    u2 = uniform(philox(count, seed, 1, device), torch.float64)
    return (-2 * u1.log()).sqrt() * (2 * math.pi * u2).cos()
