"""The first layer of a fused program: normalisation, convolution, ReLU and max-pool.

There are two: one in bf16 by the stem's own operators, one in any other precision, which is how a
program is compared with autograd.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rtk.nn._fused.layers import Layer
from rtk.nn._fused.structure import Scale, Structure
from rtk.ops.fold_weights import FoldedLayer
from rtk.ops.fused_conv2d import fused_conv2d, fused_conv2d_bwd_input
from rtk.ops.positive_bits import pack_positive
from rtk.ops.stem_conv2d import stem_conv2d, stem_conv2d_bwd_input

# The images' shape, that before the max-pool (PlainStem), and where the maxima lay.
Saved = tuple[torch.Size, torch.Size, Tensor]


class _Stem:
    def __init__(self, structure: Structure, device: torch.device, dtype: torch.dtype) -> None:
        self.layer: Layer = structure.layers[0]
        self.pool = structure.pool
        exact = torch.promote_types(dtype, torch.float32)
        self.mean = _channels(structure.mean, 0.0, device, exact)
        self.std = _channels(structure.std, 1.0, device, exact)

    def refold(self, folded: FoldedLayer) -> None:
        """Take weights that were folded anew."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Saved]:
        """Return the activation, (N, K, H, W), its gate (`gate_of`), and what `backward` needs."""
        raise NotImplementedError

    def infer(self, x: Tensor) -> Tensor:
        """Return the activation alone."""
        raise NotImplementedError

    def backward(self, grad: Tensor, saved: Saved, taint: Tensor, channels_last: bool) -> Tensor:
        """Return the gradient in the images from the activation's, which is gated already.

        `taint` is a scalar: 0, or NaN to make all of it NaN.
        """
        raise NotImplementedError


class BFloat16Stem(_Stem):
    """By rtk.ops.stem_conv2d. Images of another dtype than fp32 and bf16 are cast to fp32."""

    def __init__(self, structure: Structure, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(structure, device, dtype)
        self._weight = torch.empty(self.layer.conv.weight.shape, device=device)

    def refold(self, folded: FoldedLayer) -> None:
        # The operators take fp32 and round to bf16, which these weights went through already.
        self._weight.copy_(folded.weight)  # in place: a captured graph reads it there
        self._bias = folded.bias

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Saved]:
        out, index, positive = self._convolve(x, save_positive=True)
        gate = positive if has_bits(out) else out
        return out, gate, (x.shape, out.shape, index)

    def infer(self, x: Tensor) -> Tensor:
        return self._convolve(x, save_positive=False)[0]

    def _convolve(self, x: Tensor, *, save_positive: bool) -> tuple[Tensor, ...]:
        return stem_conv2d(
            x if x.dtype in (torch.float32, torch.bfloat16) else x.float(),
            self._weight,
            self._bias,
            self.mean,
            self.std,
            stride=self.layer.stride,
            padding=self.layer.padding,
            pool=self.pool,
            save_positive=save_positive,
        )

    def backward(self, grad: Tensor, saved: Saved, taint: Tensor, channels_last: bool) -> Tensor:
        size, _, index = saved
        return stem_conv2d_bwd_input(
            grad,
            index,
            self._weight,
            self.std + taint,
            input_size=size,
            stride=self.layer.stride,
            padding=self.layer.padding,
            pool=self.pool,
            dtype=torch.bfloat16,
            channels_last=channels_last,
        )


class PlainStem(_Stem):
    """In the precision of the folded weights, piece by piece."""

    def refold(self, folded: FoldedLayer) -> None:
        self._folded = folded

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Saved]:
        size = x.shape
        dtype = self._folded.weight.dtype
        x = ((x - _image(self.mean)) / _image(self.std)).to(dtype)
        out = fused_conv2d(
            x,
            self._folded.weight,
            self._folded.bias,
            relu=True,
            stride=self.layer.stride,
            padding=self.layer.padding,
        )
        if not self.pool:
            return out, gate_of(out), (size, out.shape, out.new_empty(0))
        pooled, index = F.max_pool2d(out, 3, stride=2, padding=1, return_indices=True)
        pooled = pooled.contiguous(memory_format=torch.channels_last)
        return pooled, gate_of(pooled), (size, out.shape, index)

    def infer(self, x: Tensor) -> Tensor:
        return self.forward(x)[0]

    def backward(self, grad: Tensor, saved: Saved, taint: Tensor, channels_last: bool) -> Tensor:
        size, before, index = saved
        if self.pool:
            spread = grad.new_zeros(before).flatten(2)
            spread.scatter_add_(2, index.flatten(2), grad.flatten(2))
            grad = spread.view(before)
        dx = fused_conv2d_bwd_input(
            grad,
            self._folded.turned,
            size[2:],
            stride=self.layer.stride,
            padding=self.layer.padding,
        ) / _image(self.std + taint)
        return dx.contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )


def has_bits(activation: Tensor) -> bool:
    """Whether an activation's bits can gate it: fused_conv2d takes those of 64 channels."""
    return activation.shape[1] % 64 == 0


def gate_of(activation: Tensor) -> Tensor:
    """Return what is kept of an activation for the way back: where it is positive, or itself."""
    return pack_positive(activation) if has_bits(activation) else activation


def _image(scale: Tensor) -> Tensor:
    return scale.view(3, 1, 1)


def _channels(
    scale: Scale | None, default: float, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return (3,); of a buffer that is so already, a view, which goes along with its values."""
    if not isinstance(scale, Tensor):
        scale = torch.tensor(default if scale is None else scale, dtype=torch.float64)
    return scale.detach().to(device, dtype).reshape(-1).expand(3).contiguous()
