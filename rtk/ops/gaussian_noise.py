"""gaussian_noise: what randomised smoothing adds to an image, the same on every machine.

Which pixel gets which random number is told in `rtk/ops/_philox.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rtk.ops._layout import memory_format
from rtk.ops._philox import split_seed, standard_normal
from rtk.ops._registry import Op, require
from rtk.ops.pgd_init import BLOCKS, check_noisy, placement, why_not_triton_noise
from rtk.ops.pgd_step import to_pixels


def gaussian_noise(
    x: Tensor, *, sigma: float, seed: int | Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Return x + sigma N(0, 1), not clipped (Cohen et al. 2019, arXiv 1902.02918).

    The normals are Box and Muller's of Philox words, as in `pgd_init`: a seed gives the same noise
    on every device and in every memory format, up to the rounding of log and cos.

    Args:
        x: (N, ...) images, up to four dimensions, floating or uint8 (0..255 for 0..1).
        sigma: standard deviation in [0, 1] pixel scale, e.g. 0.25.
        seed: 0 <= seed < 2**63; the same seed gives the same noise. Or one int64 on x's device,
            which the kernel reads: a captured CUDA graph draws anew in every replay if the graph,
            or whoever replays it, changes the number.
        dtype: of the result, floating; x's by default, fp32 for uint8.

    Returns:
        A new tensor in x's memory format; computed in fp32 (fp64 for fp64). It does not require
        grad.

    Raises:
        RtkError: if sigma is negative, the seed out of range or no int64, a dtype not floating.
    """
    if dtype is None:
        dtype = torch.float32 if x.dtype == torch.uint8 else x.dtype
    number, tensor = split_seed("gaussian_noise", seed)
    return _op(x, tensor, sigma=sigma, dtype=dtype, seed=number)


def _check(
    x: Tensor, seed_tensor: Tensor | None = None, *, sigma: float, dtype: torch.dtype, seed: int
) -> None:
    check_noisy("gaussian_noise", x, seed_tensor)
    require(sigma >= 0, "gaussian_noise: sigma must be >= 0 in [0, 1] pixel scale, got %s", sigma)
    require(
        dtype.is_floating_point,
        "gaussian_noise: dtype must be floating, got %s; use float32",
        dtype,
    )


def _empty(x: Tensor, *_: object, dtype: torch.dtype, **__: object) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=memory_format(x))


_op = Op(
    "gaussian_noise(Tensor x, Tensor? seed_tensor=None, *, float sigma, ScalarType dtype, int seed)"
    " -> Tensor",
    _check,
    _empty,
)
_op.no_gradient()


def _why_not_triton(x: Tensor, *_: object, dtype: torch.dtype, **__: object) -> str | None:
    if dtype not in (torch.float32, torch.bfloat16):
        return f"the result is {dtype}, it gives torch.float32, torch.bfloat16"
    return why_not_triton_noise(x)


@_op.implementation("triton", _why_not_triton)
def _triton(
    x: Tensor, seed_tensor: Tensor | None = None, *, sigma: float, dtype: torch.dtype, seed: int
) -> Tensor:
    from rtk.kernels.gaussian_noise import gaussian_noise as kernel

    x = x.contiguous(memory_format=memory_format(x))
    out = _empty(x, dtype=dtype)
    if out.numel() == 0:
        return out
    programs, sizes, transposed = placement(x)
    with torch.cuda.device_of(x):
        kernel[(programs,)](
            x,
            out,
            seed if seed_tensor is None else seed_tensor,
            *sizes,
            sigma,
            SEED_IN_MEMORY=seed_tensor is not None,
            TRANSPOSED=transposed,
            BLOCKS=BLOCKS,
            num_warps=8,
        )
    return out


# It serves the CPU too: certification of a network costs there many times what its noise does.
@_op.implementation("reference")
def _reference(
    x: Tensor, seed_tensor: Tensor | None = None, *, sigma: float, dtype: torch.dtype, seed: int
) -> Tensor:
    exact = torch.promote_types(torch.promote_types(dtype, x.dtype), torch.float32)
    drawn = seed if seed_tensor is None else seed_tensor
    normal = standard_normal(x.numel(), drawn, x.device).to(exact).reshape(x.shape)
    return _empty(x, dtype=dtype).copy_(to_pixels(x, exact) + sigma * normal)
