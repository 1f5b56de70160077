"""MaskedLinear: nn.Linear with a mask over its weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtk import ops
from rtk.nn._masked import MaskedLayer, Paths, adopt, capturing, fold_into
from rtk.ops import _masked_linear_eager
from rtk.ops._fused_conv2d_cuda import DENSITY
from rtk.ops._masked_linear_eager import CUBLAS


def _arguments(linear: nn.Linear) -> dict[str, Any]:
    return {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bias": linear.bias is not None,
        "device": "meta",
    }


class MaskedLinear(MaskedLayer, nn.Linear):
    """nn.Linear with `weight * mask` for its weight.

    Takes nn.Linear's arguments and `mask`: bool or floating, (N, K) or anything that broadcasts
    to it ((N, 1) whole outputs); None keeps everything. A plain Linear's state_dict loads too.
    After `rtk.nn.tune` it may pass over blocks of weights that are all zero.
    """

    _legend = "(N, K)"

    def __init__(self, *args: Any, mask: Tensor | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # What `rtk.nn.tune` found, as in MaskedConv2d.
        self._paths_for: Paths = {}
        self._eager_paths_for: Paths = {}
        self._densities: dict[str, float] = {}
        self._init_mask(mask)

    @classmethod
    def from_linear(cls, linear: nn.Linear, mask: Tensor | None = None) -> MaskedLinear:
        """Return a masked layer around `linear`'s own parameters (they are shared, not copied)."""
        layer = cls(**_arguments(linear))
        adopt(layer, linear, mask)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and self._paths_for:
            result = self._on_paths(input)
            if result is not None:
                return result
        # As in MaskedConv2d an fp32 master serves a bf16 input; under autocast F.linear casts more.
        weight = ops.prepare_weight(self.weight, self.mask, dtype=input.dtype)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, weight, bias)

    def _on_paths(self, input: Tensor) -> Tensor | None:
        """Return the result by the paths that `rtk.nn.tune` chose; None: `F.linear` does it all."""
        eager = input.is_cuda and not capturing()
        chosen = self._eager_paths_for if eager else self._paths_for
        paths = chosen.get(tuple(input.shape), CUBLAS)
        if paths == CUBLAS:
            return None
        densities = [self._densities.get(path, DENSITY) for path in paths]
        return _masked_linear_eager.linear(
            input, self.weight, self.mask, self.bias, paths, densities
        )

    def fold(self) -> nn.Linear:
        """Return a plain nn.Linear that holds a copy of the masked weight."""
        linear = nn.Linear(**_arguments(self))
        fold_into(linear, self)
        return linear
