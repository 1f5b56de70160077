"""FusedProgram: forward, loss and input gradient of a network, a launch a layer and direction."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rtk.attacks.fused.backward import Backward, apply_gate
from rtk.attacks.fused.wrappers import unwrap
from rtk.nn._fused.program import ForwardProgram
from rtk.nn._fused.reader import recognise
from rtk.nn._fused.stem import Saved
from rtk.nn._fused.structure import Step, Structure


class FusedProgram(ForwardProgram):
    """The input gradient of a ResNet-like network in eval mode, with its weights as constants.

    The folded weights are those of both directions. What follows the last ReLU (pooling and the
    head) runs the network's own modules under autograd and the caller's autocast. A launch for
    each of the forward's on the way back.

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
        super().__init__(recognise(unwrap(model)) if structure is None else structure, dtype)

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
        first, gate, saved = self._stem.forward(x)
        gates, sizes = {0: gate}, {0: first.shape[2:]}

        def run(step: Step, source: Tensor, residual: Tensor | None) -> Tensor:
            # What is kept for the way back is where the value is positive, as bits: so it lives no
            # longer than the forward needs it. The last one is kept by the tail anyway, and gates
            # a gradient that comes from no convolution.
            bits = step.relu and step.out != self.structure.last
            result = self._convolve(step, source, residual, save_positive=bits)
            out, gate = result if isinstance(result, tuple) else (result, result)
            if step.relu:
                gates[step.out] = gate
            sizes[step.out] = out.shape[2:]
            return out

        return self._walk(first, run), gates, sizes, saved

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
