"""FusedProgram: forward, loss and input gradient of a network, a launch a layer and direction."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rtk.attacks.fused.backward import Backward, apply_gate
from rtk.attacks.fused.layers import NotApplicable
from rtk.attacks.fused.reader import recognise
from rtk.attacks.fused.stem import BFloat16Stem, PlainStem, Saved
from rtk.attacks.fused.structure import Step, Structure
from rtk.attacks.fused.trace import unwrap
from rtk.errors import RtkError
from rtk.ops.fold_weights import FoldPlan
from rtk.ops.fused_conv2d import fused_conv2d


class FusedProgram:
    """The input gradient of a ResNet-like network in eval mode, with its weights as constants.

    The network is left alone: its convolutions, masks and batch norms are read by `refold` into
    memory of the program's own, as weights of both directions. What follows the last ReLU (pooling
    and the head) runs the network's own modules under autograd and the caller's autocast.

    A basic block takes two launches each way, a bottleneck three, one more with a downsampling
    convolution. Nothing synchronises, so it can be captured in a CUDA graph once it has run.

    Args:
        model: in eval mode; wrappers of torch.compile and DDP are looked through.
        dtype: of activations and weights. bf16 is what the GPU kernels take; fp32 and fp64
            run the operators' references, on any device, and compute what autograd does.
        structure: of `model`, where it is known already.

    Raises:
        NotApplicable: if the network is not ResNet-like, saying what and where.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype = torch.bfloat16,
        *,
        structure: Structure | None = None,
    ) -> None:
        self.structure = recognise(unwrap(model)) if structure is None else structure
        self.dtype = dtype
        layers = self.structure.layers
        self.device = layers[0].conv.weight.device
        if dtype == torch.bfloat16 and layers[0].conv.weight.dtype != torch.float32:
            raise NotApplicable(f"its weights are {layers[0].conv.weight.dtype}, not float32")
        try:
            self._plan = FoldPlan([layer.to_fold() for layer in layers], dtype)
        except RtkError as error:  # of several precisions, or on several devices
            raise NotApplicable(str(error)) from error
        self._consumers = self.structure.consumers()
        stem = BFloat16Stem if dtype == torch.bfloat16 else PlainStem
        self._stem = stem(self.structure, self.device, dtype)

    def refold(self) -> None:
        """Read the network's weights and statistics anew: once before `gradient`, on any change."""
        with torch.no_grad():
            self._folded = self._plan()
            self._stem.refold(self._folded[0])

    def gradient(
        self, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the gradient of the (summed) loss in the images, and the logits.

        Args:
            x: (N, 3, H, W), floating, in any layout.
            y: (N,) labels, for `loss`.
            loss: of (logits, y), a scalar or one value an image.

        Returns:
            (grad, logits), detached. grad is (N, 3, H, W) in the program's dtype, channels_last
            if `x` is; all of it is NaN if the loss is NaN or infinite.
        """
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            activation, gates, sizes, saved = self._forward(x.detach())
        grad, logits, total = self._tail(activation, y, loss)
        del activation
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            grad = apply_gate(grad.to(self.dtype), gates.pop(self.structure.last))
            backward = Backward(self.structure, self._folded, self._consumers, gates, sizes)
            grad = backward.run(grad)
            # 0, or NaN: a gate closes for a NaN, and a broken network would seem to be robust.
            taint = 0 * total.float()
            return self._stem.backward(grad, saved, taint, _is_channels_last(x)), logits

    def _forward(self, x: Tensor) -> tuple[Tensor, dict[int, Tensor], dict[int, torch.Size], Saved]:
        """Return the last activation, and by value: gates, heights and widths; and the stem's."""
        out, gate, saved = self._stem.forward(x)
        values, gates, sizes = {0: out}, {0: gate}, {0: out.shape[2:]}
        unread = list(self._consumers)

        def read(number: int) -> Tensor:
            unread[number] -= 1
            return values[number] if unread[number] else values.pop(number)

        for step in self.structure.steps:
            source = read(step.source)
            residual = None if step.residual is None else read(step.residual)
            out, positive = self._run(step, source, residual)
            del source, residual
            values[step.out], sizes[step.out] = out, out.shape[2:]
            if positive is not None:
                gates[step.out] = positive
        return out, gates, sizes, saved

    def _run(
        self, step: Step, source: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return a step's value and what is kept of it for the way back: where it is positive.

        As bits, so that an activation lives no longer than the forward needs it. The last one is
        kept by the tail anyway, and gates a gradient that comes from no convolution.
        """
        layer, folded = self.structure.layers[step.out], self._folded[step.out]
        bits = step.relu and step.out != self.structure.last
        result = fused_conv2d(
            source,
            folded.weight,
            folded.bias,
            residual,
            relu=step.relu,
            stride=layer.stride,
            padding=layer.padding,
            save_positive=bits,
        )
        out, gate = result if bits else (result, result)
        return out, gate if step.relu else None

    def _tail(
        self, activation: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss's gradient in the last activation, the logits and the loss."""
        with torch.enable_grad():
            leaf = activation.detach().requires_grad_()
            logits = self.structure.tail(leaf)
            total = loss(logits, y).sum()
            (grad,) = torch.autograd.grad(total, leaf)
        return grad, logits.detach(), total.detach()


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
