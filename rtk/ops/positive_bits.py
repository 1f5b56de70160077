"""Where an activation is positive, as bits: all that a ReLU's backward needs of it.

They take a sixteenth of a bf16 activation. `fused_conv2d` writes them beside its output
(`save_positive`) and takes them as its gate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rtk.ops import _compiled


def pack_positive(out: Tensor) -> Tensor:
    """Return out > 0 as bits.

    Channel 64 a + 8 b + 2 q + e is bit 8 e + b of word 4 a + q: the order in which the matrix
    instruction of Hopper GPUs leaves its sums, so that no lane has to ask another one.

    Args:
        out: (N, K, H, W), any dtype. NaN counts as not positive.

    Returns:
        (N, H, W, 4 ceil(K / 64)) int16, dense; the bits of channels from K on are 0.
    """
    k = out.shape[1]
    if (
        _compiled.why_not_cuda(out) is None
        and out.dtype == torch.bfloat16
        and k % 64 == 0
        and out.is_contiguous(memory_format=torch.channels_last)
    ):
        bits = empty_bits(out)
        stream = torch.cuda.current_stream(out.device).cuda_stream
        _compiled._C.positive_bits_cuda(
            out.data_ptr(), bits.data_ptr(), out.numel(), out.device.index, stream
        )
        return bits
    bits = F.pad(out.permute(0, 2, 3, 1) > 0, (0, -k % 64)).unflatten(3, (-1, 8, 4, 2))
    b, e = torch.arange(8, device=out.device), torch.arange(2, device=out.device)
    words = (bits * (1 << (8 * e + b[:, None, None]))).sum((4, 6))
    return words.to(torch.int16).flatten(3)  # the upper half of 0 to 65535 becomes negative


def unpack_positive(bits: Tensor, channels: int) -> Tensor:
    """Return what `pack_positive` packed.

    Args:
        bits: (N, H, W, 4 ceil(K / 64)) int16.
        channels: K.

    Returns:
        (N, K, H, W) bool, channels_last.
    """
    b, e = torch.arange(8, device=bits.device), torch.arange(2, device=bits.device)
    words = bits.unflatten(3, (-1, 1, 4, 1)) >> (8 * e + b[:, None, None])
    return (words & 1).bool().flatten(3)[..., :channels].permute(0, 3, 1, 2)


def empty_bits(out: Tensor) -> Tensor:
    """Allocate what `pack_positive` returns for `out`."""
    n, k, h, w = out.shape
    return torch.empty((n, h, w, 4 * -(-k // 64)), dtype=torch.int16, device=out.device)
