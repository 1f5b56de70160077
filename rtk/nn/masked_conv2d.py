"""MaskedConv2d: nn.Conv2d with a mask over its weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtk import ops
from rtk.nn._masked import MaskedLayer, Paths, adopt, fold_into
from rtk.ops import engine
from rtk.ops._conv_paths import CUDNN, reads_turned
from rtk.ops._fused_conv2d_cuda import DENSITY
from rtk.ops._registry import is_forced
from rtk.ops.masked_conv2d import masked_conv2d_prepared

_CAST = (torch.float32, torch.bfloat16, torch.float16)  # by autocast


@dataclass(frozen=True, eq=False)
class PreparedWeight:
    """What a model's forward has prepared of a layer's weight.

    Attributes:
        weight: (K, C, R, S), masked and cast, channels_last.
        turned: `ops.turn_filter(weight)`.
        leaf: the same memory as `weight`; its gradient becomes the layer's.
        paths: by the input's shape, what is fastest of the forward and the gradients.
        lists: what paths other than cuDNN read, by path and by whether it is of `turned`, which is
            what most read for the input's gradient.
    """

    weight: Tensor
    turned: Tensor
    leaf: Tensor
    paths: Paths
    lists: dict[tuple[str, bool], Tensor | None]

    def lists_for(self, paths: Sequence[str]) -> list[Tensor | None]:
        """Return what the paths of the forward, the input's and the weight's gradient read."""
        return [self.lists.get((path, reads_turned(path, way))) for way, path in enumerate(paths)]


def _arguments(conv: nn.Conv2d) -> dict[str, Any]:
    """Return the constructor's arguments of a layer that takes over, or gives up, a weight."""
    return {
        "in_channels": conv.in_channels,
        "out_channels": conv.out_channels,
        "kernel_size": conv.kernel_size,
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "groups": conv.groups,
        "bias": conv.bias is not None,
        "padding_mode": conv.padding_mode,
        "device": "meta",
    }


class MaskedConv2d(MaskedLayer, nn.Conv2d):
    """nn.Conv2d with `weight * mask` for its weight: a drop-in, whatever the granularity.

    Takes nn.Conv2d's arguments and `mask`: bool or floating, (K, C, R, S) or anything that
    broadcasts to it ((K, C, R, 1) row, (K, C, 1, 1) kernel, (K, 1, 1, 1) channel); None keeps
    everything. `weight`, `bias` and `mask` are its state_dict keys; a plain Conv2d's state_dict
    loads too.
    """

    _legend = "(K, C, R, S)"
    _prepared: PreparedWeight | None = None  # by the model's forward, while that runs

    def __init__(self, *args: Any, mask: Tensor | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # What `rtk.nn.tune` found to be fastest: in a CUDA graph, where launches cost no Python;
        # and eagerly.
        self._paths_for: Paths = {}
        self._eager_paths_for: Paths = {}
        self._densities: dict[str, float] = {}  # of live blocks, by path, as it found them
        self._init_mask(mask)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, mask: Tensor | None = None) -> MaskedConv2d:
        """Return a masked layer around `conv`'s own parameters (they are shared, not copied)."""
        layer = cls(**_arguments(conv))
        adopt(layer, conv, mask)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        if not engine.is_on():
            return self._conv_forward(input, self.weight * self.mask, self.bias)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        ready = self._prepared
        if ready is not None and input.dim() == 4:
            paths = ready.paths.get(tuple(input.shape), CUDNN) if ready.paths else CUDNN
            plain = self.bias is None  # whose gradient autocast would round
            if plain and paths == CUDNN and input.dtype in _CAST and not is_forced():
                sizes = self.stride, padding, self.dilation, self.groups
                return F.conv2d(input, ready.leaf, None, *sizes)
            return masked_conv2d_prepared(
                input,
                self.weight,
                self.mask,
                ready.weight,
                ready.turned,
                self.bias,
                self.stride,
                padding,
                self.dilation,
                self.groups,
                paths,
                ready.lists_for(paths),
                [self._densities.get(path, DENSITY) for path in paths],
            )
        return ops.masked_conv2d(
            input,
            self.weight,
            self.mask,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
        )

    def fold(self) -> nn.Conv2d:
        """Return a plain nn.Conv2d that holds a copy of the masked weight."""
        conv = nn.Conv2d(**_arguments(self))
        fold_into(conv, self)
        return conv
