"""What the ops of batch norm share: their checks, their tiles, and the bits of a ReLU."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from rtk.ops import _compiled
from rtk.ops._layout import memory_format
from rtk.ops._registry import require
from rtk.ops._triton import why_not_triton

LAST = torch.channels_last
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GROUP = 8  # channels that a thread reads at once and that share a byte of ReLU bits
WARPS = 8
BLOCK_C = 256  # channels of a program: runs of 512 bytes in bf16
JOIN = {"BLOCK_P": 128, "BLOCK_C": 8, "num_warps": 4}  # joins 128 parts of 8 channels at a time


def check_vectors(op: str, x: Tensor, **vectors: Tensor | None) -> None:
    """Raise an RtkError unless `x` is a batch of images and the vectors have a number a channel."""
    require(
        x.dim() == 4 and x.is_floating_point(),
        "%s: x must be (N, C, H, W) and floating, got %s %s",
        op,
        tuple(x.shape),
        x.dtype,
    )
    for name, vector in vectors.items():
        if vector is None:
            continue
        require(
            vector.dim() == 1 and vector.shape[0] == x.shape[1],
            "%s: %s must be (C,) = (%s,), got %s",
            op,
            name,
            x.shape[1],
            tuple(vector.shape),
        )
        check_device(op, name, vector, x)


def check_like(op: str, name: str, tensor: Tensor | None, x: Tensor) -> None:
    """Raise an RtkError unless `tensor`, if there is one, has the shape and device of `x`."""
    if tensor is None:
        return
    require(
        tensor.shape == x.shape,
        "%s: %s and x must have one shape, got %s and %s",
        op,
        name,
        tuple(tensor.shape),
        tuple(x.shape),
    )
    check_device(op, name, tensor, x)


def check_device(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    """Raise an RtkError unless `tensor` is where `x` is."""
    require(
        tensor.device == x.device,
        "%s: %s is on %s and x on %s; move one with .to()",
        op,
        name,
        tensor.device,
        x.device,
    )


def check_batch(op: str, x: Tensor) -> None:
    """Raise an RtkError where a channel has one value, and so no variance."""
    require(
        x.numel() != x.shape[1],
        "%s: expected more than 1 value per channel when training, got %s; use larger batches, "
        "or the running statistics",
        op,
        tuple(x.shape),
    )


def exact_dtype(x: Tensor) -> torch.dtype:
    """Return what statistics of `x` are computed in: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def shaped(vector: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a number a channel as `dtype`, shaped to broadcast over (N, C, H, W)."""
    return vector.to(dtype).view(-1, 1, 1)


def rows_of(x: Tensor) -> int:
    """Return N H W."""
    return x.numel() // x.shape[1]


def empty_like(x: Tensor) -> Tensor:
    """Return memory like `x`, dense."""
    return torch.empty_like(x, memory_format=memory_format(x))


def empty_positive(x: Tensor, save: bool) -> Tensor:
    """Return memory for a byte of every 8 channels of every pixel, or for nothing."""
    n, c, h, w = x.shape
    size = (n, h, w, -(-c // GROUP)) if save else (0,)
    return torch.empty(size, dtype=torch.uint8, device=x.device)


def pack(positive: Tensor) -> Tensor:
    """Return (N, H, W, ceil(C / 8)) uint8 of (N, C, H, W) bool: bit i is channel 8 g + i."""
    bits = F.pad(positive.permute(0, 2, 3, 1), (0, -positive.shape[1] % GROUP))
    place = 1 << torch.arange(GROUP, device=bits.device)
    return (bits.unflatten(3, (-1, GROUP)) * place).sum(4).to(torch.uint8)


def unpack(bits: Tensor, channels: int) -> Tensor:
    """Return what `pack` packed."""
    places = torch.arange(GROUP, device=bits.device, dtype=torch.uint8)
    positive = ((bits[..., None] >> places) & 1).bool()
    return positive.flatten(3)[..., :channels].permute(0, 3, 1, 2)


def sums_needed(training: bool, needs: list[bool]) -> bool:
    """Return whether gradients of (x, residual, weight, bias) need sums over the batch."""
    return (training and needs[0]) or needs[2] or needs[3]


def why_not_gpu(x: Tensor, residual: Tensor | None, *vectors: Tensor | None) -> str | None:
    """Return why the kernels cannot take these, or None where they can."""
    if _serves(x, residual, vectors):
        return None
    given = [tensor for tensor in (x, residual, *vectors) if tensor is not None]
    reason = why_not_triton(*given) or _compiled.why_not_dtype(x, "x", *DTYPES)
    if reason is not None:
        return reason
    if not x.is_contiguous(memory_format=LAST):
        return "x is not channels_last"
    if x.shape[1] % GROUP:
        return f"it takes a multiple of {GROUP} channels, not {x.shape[1]}"
    if x.numel() == 0:
        return "there are no images"
    if residual is not None and residual.dtype != x.dtype:
        return f"the residual is {residual.dtype} and x {x.dtype}"
    for vector in vectors:
        if vector is not None and (vector.dtype != torch.float32 or not vector.is_contiguous()):
            return "weight, bias and statistics must be float32 and contiguous"
    return None


def _serves(x: Tensor, residual: Tensor | None, vectors: tuple[Tensor | None, ...]) -> bool:
    """Return whether `why_not_gpu` finds nothing, as in most calls: quickly."""
    if (
        why_not_triton(x) is not None
        or x.dtype not in DTYPES
        or x.shape[1] % GROUP
        or not x.is_contiguous(memory_format=LAST)
        or x.numel() == 0
    ):
        return False
    if residual is not None and (residual.dtype != x.dtype or not residual.is_cuda):
        return False
    for vector in vectors:
        if vector is not None and (
            vector.dtype != torch.float32 or not vector.is_cuda or not vector.is_contiguous()
        ):
            return False
    return True


@functools.cache
def programs(device: torch.device) -> int:
    """Return how many programs of 8 warps a GPU runs at once."""
    if device.type != "cuda":
        return 8  # under Triton's interpreter
    return 3 * torch.cuda.get_device_properties(device).multi_processor_count


def tiling(x: Tensor, accesses: int) -> tuple[int, dict[str, int]]:
    """Return the number of blocks of channels, and a tile with `accesses` of 16 bytes a thread."""
    return _tiling(x.shape[1], x.element_size(), accesses)


@functools.cache
def _tiling(channels: int, itemsize: int, accesses: int) -> tuple[int, dict[str, int]]:
    block = min(BLOCK_C, 1 << (channels - 1).bit_length())
    unrolled = max(1, accesses * 2 // itemsize)
    threads = WARPS * 32
    sizes = {"U": unrolled, "R": threads * GROUP // block, "BLOCK_C": block}
    return -(-channels // block), sizes | {"num_warps": WARPS}


def split_rows(x: Tensor, blocks: int, tile: int) -> tuple[int, int]:
    """Return into how many parts the rows are split, of how many tiles each."""
    tiles = -(-rows_of(x) // tile)
    tiles_a_part = -(-tiles // max(1, programs(x.device) // blocks))
    return -(-tiles // tiles_a_part), tiles_a_part
