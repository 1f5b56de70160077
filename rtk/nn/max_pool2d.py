"""MaxPool2d: nn.MaxPool2d that runs rtk's kernel where there is one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rtk import ops
from rtk.ops import engine


class MaxPool2d(nn.MaxPool2d):
    """nn.MaxPool2d; on a GPU a 3x3 window with stride 2 and padding 1 is `rtk.ops.max_pool2d`."""

    def forward(self, input: Tensor) -> Tensor:
        ours = (
            engine.is_on()
            and input.is_cuda
            and self._is_stem
            and input.dim() == 4
            and input.is_contiguous(memory_format=torch.channels_last)
            and not torch._C._are_functorch_transforms_active()
        )
        return ops.max_pool2d(input) if ours else super().forward(input)

    @property
    def _is_stem(self) -> bool:
        sizes = self.kernel_size, self.stride, self.padding, self.dilation
        pairs = tuple(tuple(size) if isinstance(size, tuple) else (size, size) for size in sizes)
        plain = not self.return_indices and not self.ceil_mode
        return plain and pairs == ((3, 3), (2, 2), (1, 1), (1, 1))
