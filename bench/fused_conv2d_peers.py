"""What `fused_conv2d` is measured against: cuDNN, as torch's own operators reach it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rtk.ops import turn_filter
from rtk.ops._conv_output import natural_size, output_shape


def cudnn(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    relu: bool = False,
    stride: int = 1,
    padding: int = 0,
    upsample: int = 1,
    out_size: Sequence[int] | None = None,
    residual_stride: int = 1,
    forward_weight: Tensor | None = None,
) -> Tensor:
    """Return what `fused_conv2d` does, rounded in between; `gate` is an activation, not its bits.

    cuDNN's fused operators run where they can (ReLU, no gate, residual of the output's size); else
    its convolution, or for upsample=2 the transposed one, and one operator for each of residual,
    ReLU and gate. The transposed one takes `forward_weight`, the weight of the forward convolution,
    which costs time to make here.
    """
    bias = None if bias is None else bias.to(input.dtype)
    fused = relu and gate is None and residual_stride == 1 and upsample == 1 and out_size is None
    if fused:
        conv = (bias, [stride] * 2, [padding] * 2, [1, 1], 1)
        if residual is None:
            return torch.cudnn_convolution_relu(input, weight, *conv)
        return torch.cudnn_convolution_add_relu(input, weight, residual, 1.0, *conv)
    size = output_shape(input, weight, stride, padding, upsample, out_size)[2:]
    if upsample == 1:
        z = F.conv2d(input, weight, bias, stride, padding)
    else:
        natural = natural_size(input, weight, stride, padding, upsample)
        z = F.conv_transpose2d(
            input,
            turn_filter(weight) if forward_weight is None else forward_weight,
            bias,
            stride=upsample,
            padding=[taps - 1 - padding for taps in weight.shape[2:]],
            output_padding=[max(0, w - n) for w, n in zip(size, natural, strict=True)],
        )
    z = z[:, :, : size[0], : size[1]]
    if residual is not None:
        z[:, :, ::residual_stride, ::residual_stride] += residual
    if relu:
        z.relu_()
    return z if gate is None else torch.ops.aten.threshold_backward(z, gate, 0)
