"""The way back through a fused program: from the last activation's gradient to the stem's.

A value's gradient is the sum over all that read it, through its ReLU. The last of them to be
visited adds what the others left (`pending`) as its residual and applies the gate, so neither takes
a kernel of its own: the gradient of a block's output, passed on by the skip connection, is itself
the residual of the block's first convolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rtk.nn._fused.structure import Structure
from rtk.ops.fold_weights import FoldedLayer
from rtk.ops.fused_conv2d import fused_conv2d, fused_conv2d_bwd_input
from rtk.ops.positive_bits import unpack_positive

Pending = tuple[Tensor, int]  # a gradient, and the stride of the pixels that it belongs to


class Backward:
    """One pass.

    Args:
        structure: of the network.
        folded: its layers' weights.
        consumers: how often each value is read.
        gates: of each post-ReLU value that a step reads; taken out as they are used.
        sizes: (H, W) of each value.
    """

    def __init__(
        self,
        structure: Structure,
        folded: Sequence[FoldedLayer],
        consumers: Sequence[int],
        gates: dict[int, Tensor],
        sizes: dict[int, torch.Size],
    ) -> None:
        self._structure = structure
        self._folded = folded
        self._left = list(consumers)
        self._gates = gates
        self._sizes = sizes
        self._complete: dict[int, Tensor] = {}
        self._pending: dict[int, Pending] = {}

    def run(self, grad: Tensor) -> Tensor:
        """Return the stem's gradient, gated, from the last value's, gated too."""
        self._complete[self._structure.last] = grad
        del grad  # each gradient is freed as soon as all have read it
        for step in reversed(self._structure.steps):
            of_step = self._complete.pop(step.out)
            if step.residual is not None:
                self._skip(step.residual, of_step)
            self._convolve(step.source, of_step, step.out)
        return self._complete.pop(0)

    def _skip(self, value: int, grad: Tensor) -> None:
        """Hand `grad` on to a value that was added as it is."""
        self._left[value] -= 1
        total = _plus(grad, self._pending.pop(value, None))
        if self._left[value]:
            self._pending[value] = (total, 1)
        else:  # without a gate: a convolution without ReLU
            gate = self._gates.pop(value, None)
            self._complete[value] = total if gate is None else apply_gate(total, gate)

    def _convolve(self, value: int, grad: Tensor, number: int) -> None:
        """Hand `grad` on to the value that layer `number` convolved."""
        layer, turned = self._structure.layers[number], self._folded[number].turned
        self._left[value] -= 1
        is_last = self._left[value] == 0
        earlier = self._pending.pop(value, None)
        if layer.pointwise and layer.stride == 2 and earlier is None and not is_last:
            # Only every second pixel has a gradient: three quarters would be zeros.
            self._pending[value] = (fused_conv2d(grad, turned), 2)
            return
        residual, residual_stride = (None, 1) if earlier is None else earlier
        out = fused_conv2d_bwd_input(
            grad,
            turned,
            self._sizes[value],
            residual=residual,
            gate=self._gates.pop(value) if is_last else None,
            stride=layer.stride,
            padding=layer.padding,
            residual_stride=residual_stride,
        )
        if is_last:
            self._complete[value] = out
        else:
            self._pending[value] = (out, 1)


def apply_gate(grad: Tensor, gate: Tensor) -> Tensor:
    """Return `grad` where `gate` (an activation, or its bits) is positive, else 0."""
    if gate.dtype == torch.int16:
        return grad.masked_fill(~unpack_positive(gate, grad.shape[1]), 0)
    # In the activation's layout, whatever that of the gradient: a pooling's may be expanded.
    out = torch.empty_like(gate)
    return torch.ops.aten.threshold_backward.grad_input(grad, gate, 0, grad_input=out)


def _plus(grad: Tensor, pending: Pending | None) -> Tensor:
    if pending is None:
        return grad
    other, stride = pending
    if stride == 1:
        return grad + other
    total = grad.clone()
    total[:, :, ::stride, ::stride] += other
    return total
