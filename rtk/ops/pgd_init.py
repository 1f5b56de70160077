"""pgd_init: a random start in the ball around each image, the same on every machine.

Which pixel gets which random number is told in `rtk/ops/_philox.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rtk.ops import _compiled
from rtk.ops._layout import memory_format
from rtk.ops._philox import (
    check_seed,
    philox,
    seed_on_host,
    split_seed,
    standard_normal,
    uniform,
)
from rtk.ops._registry import Op, require
from rtk.ops._triton import why_not_triton
from rtk.ops.pgd_step import check_ball, check_images, per_image_norm, to_pixels

BLOCKS = 256  # of Philox, four pixels each, that a program of the Triton kernels takes


def pgd_init(
    x: Tensor,
    *,
    eps: float,
    norm: str = "linf",
    clip: tuple[float, float] = (0.0, 1.0),
    seed: int | Tensor,
) -> Tensor:
    """Return `x` plus a random point of the ball of radius `eps`, clipped.

    Linf: each pixel moves by a uniform draw from [-eps, eps). L2: each image moves by a point that
    is uniform in the ball (a normalised Gaussian direction, radius eps U^(1/d)).

    Args:
        x: (N, ...) images, up to four dimensions, floating or uint8 (0..255 for 0..1).
        eps: radius in [0, 1] pixel scale, e.g. 8/255.
        norm: "linf" or "l2".
        clip: the range of valid pixels.
        seed: 0 <= seed < 2**63; the same seed gives the same start. Or one int64 on x's device,
            which the kernel reads: a captured CUDA graph starts elsewhere in every replay if the
            graph, or whoever replays it, changes the number.

    Returns:
        A new tensor in x's dtype and memory format (fp32 for uint8). It does not require grad.

    Raises:
        RtkError: if eps is negative, the norm unknown, the seed out of range or no int64.
    """
    number, tensor = split_seed("pgd_init", seed)
    return _op(
        x,
        tensor,
        eps=eps,
        norm=norm,
        clip_min=clip[0],
        clip_max=clip[1],
        seed=number,
    )


def check_noisy(op: str, x: Tensor, seed_tensor: Tensor | None) -> None:
    """Raise an RtkError unless noise can be added to the images `x` under this seed."""
    check_images(op, "x", x)
    require(x.dim() <= 4, "%s: x must have up to 4 dimensions, got %s", op, tuple(x.shape))
    check_seed(op, x, seed_tensor)


def _check(
    x: Tensor,
    seed_tensor: Tensor | None = None,
    *,
    eps: float,
    norm: str,
    clip_min: float,
    clip_max: float,
    seed: int,
) -> None:
    check_ball("pgd_init", eps, norm, clip_min, clip_max)
    check_noisy("pgd_init", x, seed_tensor)


def _empty(x: Tensor, *_: object, **__: object) -> Tensor:
    dtype = torch.float32 if x.dtype == torch.uint8 else x.dtype
    return torch.empty_like(x, dtype=dtype, memory_format=memory_format(x))


_op = Op(
    "pgd_init(Tensor x, Tensor? seed_tensor=None, *, float eps, str norm, float clip_min, "
    "float clip_max, int seed) -> Tensor",
    _check,
    _empty,
)
_op.no_gradient()


def _why_not_dtype(x: Tensor) -> str | None:
    return _compiled.why_not_dtype(x, "x", torch.float32, torch.bfloat16, torch.uint8)


def _why_not_cpu(x: Tensor, *_: object, **__: object) -> str | None:
    return _compiled.why_not_cpu(x) or _why_not_dtype(x)


@_op.implementation("cpu", _why_not_cpu)
def _cpu(
    x: Tensor,
    seed_tensor: Tensor | None = None,
    *,
    eps: float,
    norm: str,
    clip_min: float,
    clip_max: float,
    seed: int,
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
        seed_on_host(seed, seed_tensor),
        torch.get_num_threads(),
    )
    return out


def why_not_triton_noise(x: Tensor) -> str | None:
    """Return why the Triton kernels cannot add noise to `x`, or None where they can."""
    if x.numel() >= 2**31 * max(1, x.shape[0]):
        return "an image has 2**31 pixels or more"
    return why_not_triton(x) or _why_not_dtype(x)


def placement(x: Tensor, by_image: bool = False) -> tuple[int, tuple[int, int, int, int], bool]:
    """Describe dense images to a Triton kernel, as its `place` takes them.

    Returns:
        The number of programs; (programs, pixels, channels, pixels of a channel) of an image, where
        the batch counts as one image unless `by_image`; whether channels are last in memory.
    """
    transposed = memory_format(x) == torch.channels_last
    images = x.shape[0] if by_image or transposed else 1
    count = x.numel() // images
    rows = x.shape[1] if transposed else 1
    tiles = -(-(count + 3) // (4 * BLOCKS))
    return images * tiles, (tiles, count, rows, count // rows), transposed


@_op.implementation("triton", lambda x, *_, **__: why_not_triton_noise(x))
def _triton(
    x: Tensor,
    seed_tensor: Tensor | None = None,
    *,
    eps: float,
    norm: str,
    clip_min: float,
    clip_max: float,
    seed: int,
) -> Tensor:
    from rtk.kernels import pgd_init as kernels

    x = x.contiguous(memory_format=memory_format(x))
    out = _empty(x)
    if out.numel() == 0:
        return out
    ball = (eps, clip_min, clip_max)
    drawn = seed if seed_tensor is None else seed_tensor
    options = {"SEED_IN_MEMORY": seed_tensor is not None, "BLOCKS": BLOCKS, "num_warps": 8}
    with torch.cuda.device_of(x):
        if norm == "linf":
            programs, sizes, transposed = placement(x)
            kernels.pgd_init_linf[(programs,)](
                x,
                out,
                drawn,
                *sizes,
                *ball,
                TRANSPOSED=transposed,
                enable_fp_fusion=False,  # the bits are PyTorch's
                **options,
            )
        else:
            programs, sizes, transposed = placement(x, by_image=True)
            sums = torch.empty(programs, dtype=torch.float32, device=x.device)
            kernels.pgd_init_l2_sums[(programs,)](sums, drawn, *sizes[:2], **options)
            squares = sums.view(x.shape[0], -1).sum(1)
            kernels.pgd_init_l2[(programs,)](
                x, out, squares, drawn, *sizes, *ball, TRANSPOSED=transposed, **options
            )
    return out


@_op.implementation("reference")
def _reference(
    x: Tensor,
    seed_tensor: Tensor | None = None,
    *,
    eps: float,
    norm: str,
    clip_min: float,
    clip_max: float,
    seed: int,
) -> Tensor:
    out = _empty(x)
    exact = torch.promote_types(out.dtype, torch.float32)
    pixels = to_pixels(x, exact)
    drawn = seed if seed_tensor is None else seed_tensor
    if norm == "linf":
        words = philox(x.numel(), drawn, 0, x.device)
        delta = ((uniform(words, exact) * 2 - 1) * eps).reshape(x.shape)
    else:
        normal = standard_normal(x.numel(), drawn, x.device).to(exact).reshape(x.shape)
        # One radius an image, from the first word of the image's own block in a third stream.
        words = philox(4 * x.shape[0], drawn, 2, x.device)[::4]
        dimensions = max(1, x.numel() // max(1, x.shape[0]))
        radius = eps * (uniform(words, exact) + 2.0**-24) ** (1 / dimensions)
        delta = normal * (radius.view(-1, *[1] * (x.dim() - 1)) / per_image_norm(normal))
    return out.copy_((pixels + delta).clamp(clip_min, clip_max))
