"""Which convolutions and batch norms the fused operators take, and what is folded of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rtk.nn.masked_conv2d import MaskedConv2d
from rtk.ops.fold_weights import FoldLayer

_DTYPES = (torch.float32, torch.float64)


class NotApplicable(Exception):
    """Why a network has no fused program, in a few words."""


@dataclass(frozen=True)
class Layer:
    """A convolution and the batch norm that follows it."""

    name: str
    conv: nn.Conv2d
    norm: nn.modules.batchnorm._BatchNorm

    @property
    def stride(self) -> int:
        return self.conv.stride[0]

    @property
    def padding(self) -> int:
        padding = self.conv.padding[0]
        assert isinstance(padding, int)
        return padding

    @property
    def pointwise(self) -> bool:
        """Whether it is 1x1, without padding."""
        return self.conv.kernel_size[0] == 1 and self.padding == 0

    def to_fold(self) -> FoldLayer:
        """Return what is folded: the tensors that the modules hold now."""
        conv, norm = self.conv, self.norm

        def plain(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.detach()

        return FoldLayer(
            conv.weight.detach(),
            mask=conv.mask if isinstance(conv, MaskedConv2d) else None,
            bias=plain(conv.bias),
            mean=norm.running_mean,
            var=norm.running_var,
            gamma=plain(norm.weight),
            beta=plain(norm.bias),
            eps=norm.eps,
        )


def why_not_convolution(conv: nn.Conv2d, *, stem: bool) -> str | None:
    """Return why the fused operators do not take a convolution, or None."""
    if type(conv) not in (nn.Conv2d, MaskedConv2d):
        return f"it is a {type(conv).__name__}, not a Conv2d"
    if conv.groups != 1 or conv.dilation != (1, 1) or conv.padding_mode != "zeros":
        return "it has groups, dilation or a padding that is not zeros"
    if isinstance(conv.padding, str):
        return f"its padding is {conv.padding!r}, not a number"
    for name in ("kernel_size", "stride", "padding"):
        down, across = getattr(conv, name)
        if down != across:
            return f"its {name} is {down} x {across}, not square"
    if conv.padding[0] >= conv.kernel_size[0]:
        return "its padding is as large as its filter"
    if conv.stride[0] > 2:
        return f"its stride is {conv.stride[0]}, not 1 or 2"
    if stem and conv.in_channels != 3:
        return f"it reads images of {conv.in_channels} channels, not 3"
    if conv.out_channels % 8 or (conv.in_channels % 8 and not stem):
        return f"{conv.in_channels} -> {conv.out_channels} channels are no multiples of 8"
    if isinstance(conv, MaskedConv2d) and conv.mask.dtype != torch.bool:
        return f"its mask is {conv.mask.dtype}, not bool"
    if conv.weight.dtype not in _DTYPES:
        return f"its weight is {conv.weight.dtype}, not float32"
    return None


def why_not_norm(norm: nn.modules.batchnorm._BatchNorm) -> str | None:
    """Return why a batch norm cannot be folded, or None."""
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    if norm.training:
        return "it is in training mode"
    return None
