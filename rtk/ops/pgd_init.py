"""pgd_init: a random start in the ball around each image, the same on every machine.

The numbers come from Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1,
2, 3"): word i % 4 of the block with counter i // 4 belongs to pixel i of the batch in N, C, H, W
order. So a seed gives the same start whatever the memory format, the device or the thread count.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rtk.ops import _compiled
from rtk.ops._layout import memory_format
from rtk.ops._registry import Op, require
from rtk.ops.pgd_step import check_ball, check_images, per_image_norm, to_pixels

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def pgd_init(
    x: Tensor,
    *,
    eps: float,
    norm: str = "linf",
    clip: tuple[float, float] = (0.0, 1.0),
    seed: int,
) -> Tensor:
    """Return `x` plus a random point of the ball of radius `eps`, clipped.

    Linf: each pixel moves by a uniform draw from [-eps, eps). L2: each image moves by a point that
    is uniform in the ball (a normalised Gaussian direction, radius eps U^(1/d)).

    Args:
        x: (N, ...) images, up to four dimensions, floating or uint8 (0..255 for 0..1).
        eps: radius in [0, 1] pixel scale, e.g. 8/255.
        norm: "linf" or "l2".
        clip: the range of valid pixels.
        seed: 0 <= seed < 2**63; the same seed gives the same start.

    Returns:
        A new tensor in x's dtype and memory format (fp32 for uint8). It does not require grad.

    Raises:
        RtkError: if eps is negative, the norm unknown, the seed out of range.
    """
    require(0 <= seed < 2**63, "pgd_init: seed must be in [0, 2**63), got %s", seed)
    return _op(x, eps=eps, norm=norm, clip_min=clip[0], clip_max=clip[1], seed=seed)


def _check(
    x: Tensor, *, eps: float, norm: str, clip_min: float, clip_max: float, seed: int
) -> None:
    check_ball("pgd_init", eps, norm, clip_min, clip_max)
    check_images("pgd_init", "x", x)
    require(x.dim() <= 4, "pgd_init: x must have up to 4 dimensions, got %s", tuple(x.shape))


def _empty(x: Tensor, **_: object) -> Tensor:
    dtype = torch.float32 if x.dtype == torch.uint8 else x.dtype
    return torch.empty_like(x, dtype=dtype, memory_format=memory_format(x))


_op = Op(
    "pgd_init(Tensor x, *, float eps, str norm, float clip_min, float clip_max, int seed)"
    " -> Tensor",
    _check,
    _empty,
)
_op.no_gradient()


def _why_not_cpu(x: Tensor, **_: object) -> str | None:
    return _compiled.why_not_cpu(x) or _compiled.why_not_dtype(
        x, "x", torch.float32, torch.bfloat16, torch.uint8
    )


@_op.implementation("cpu", _why_not_cpu)
def _cpu(
    x: Tensor, *, eps: float, norm: str, clip_min: float, clip_max: float, seed: int
) -> Tensor:
    out = _empty(x)
    if out.numel() == 0:
        return out
    pad = 4 - x.dim()
    # The batch comes first, so missing dimensions are put between it and the pixels.
    sizes, x_strides, out_strides = (
        [values[0], *[fill] * pad, *values[1:]]
        for values, fill in ((x.shape, 1), (x.stride(), 0), (out.stride(), 0))
    )
    _compiled._C.pgd_init_cpu(
        x.data_ptr(),
        _compiled.DTYPES[x.dtype],
        out.data_ptr(),
        _compiled.DTYPES[out.dtype],
        *sizes,
        x_strides,
        out_strides,
        eps,
        norm == "l2",
        clip_min,
        clip_max,
        seed,
        torch.get_num_threads(),
    )
    return out


def philox(count: int, seed: int, stream: int, device: torch.device) -> Tensor:
    """Return words 0..count-1 of Philox4x32-10 under `seed` as int64 in [0, 2**32).

    `stream` is the third counter word: streams do not overlap.
    """
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


def _uniform(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Map 32-bit words to [0, 1) on a grid of 2**-24, which fp32 holds exactly."""
    return (words >> 8).to(dtype) * 2.0**-24


@_op.implementation("reference")
def _reference(
    x: Tensor, *, eps: float, norm: str, clip_min: float, clip_max: float, seed: int
) -> Tensor:
    out = _empty(x)
    exact = torch.promote_types(out.dtype, torch.float32)
    pixels = to_pixels(x, exact)
    first = philox(x.numel(), seed, 0, x.device)
    if norm == "linf":
        delta = ((_uniform(first, exact) * 2 - 1) * eps).reshape(x.shape)
    else:
        second = philox(x.numel(), seed, 1, x.device)
        u1 = _uniform(first, exact) + 2.0**-24  # in (0, 1], for the logarithm
        u2 = _uniform(second, exact)
        normal = ((-2 * u1.log()).sqrt() * (2 * math.pi * u2).cos()).reshape(x.shape)
        # One radius an image, from the first word of the image's own block in a third stream.
        words = philox(4 * x.shape[0], seed, 2, x.device)[::4]
        dimensions = max(1, x.numel() // max(1, x.shape[0]))
        radius = eps * (_uniform(words, exact) + 2.0**-24) ** (1 / dimensions)
        delta = normal * (radius.view(-1, *[1] * (x.dim() - 1)) / per_image_norm(normal))
    return out.copy_((pixels + delta).clamp(clip_min, clip_max))
