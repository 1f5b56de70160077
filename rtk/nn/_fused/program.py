"""ForwardProgram: a network in eval mode, a launch a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rtk.errors import RtkError
from rtk.nn._fused.layers import NotApplicable
from rtk.nn._fused.stem import BFloat16Stem, PlainStem
from rtk.nn._fused.structure import Step, Structure
from rtk.ops.fold_weights import FoldPlan
from rtk.ops.fused_conv2d import fused_conv2d

Run = Callable[[Step, Tensor, Tensor | None], Tensor]  # (step, source, residual) -> its value


class ForwardProgram:
    """The forward of a ResNet-like network in eval mode, with its weights as constants.

    The network is left alone: its convolutions, masks and batch norms are read by `refold` into
    memory of the program's own. What follows the last ReLU (pooling and the head) runs the
    network's own modules.

    A basic block takes two launches, a bottleneck three, one more with a downsampling convolution.
    Nothing synchronises, so it can be captured in a CUDA graph once it has run.

    Args:
        structure: of the network.
        dtype: of activations and weights. bf16 is what the GPU kernels take; fp32 and fp64
            run the operators' references, on any device.

    Attributes:
        live: by step's number, of weights whose dead blocks are skipped: the words (`live_tiles`),
            and the share of live blocks.

    Raises:
        NotApplicable: if the operators do not take the network's tensors.
    """

    def __init__(self, structure: Structure, dtype: torch.dtype = torch.bfloat16) -> None:
        self.structure = structure
        self.dtype = dtype
        layers = structure.layers
        self.device = layers[0].conv.weight.device
        if dtype == torch.bfloat16 and layers[0].conv.weight.dtype != torch.float32:
            raise NotApplicable(f"its weights are {layers[0].conv.weight.dtype}, not float32")
        try:
            self._plan = FoldPlan([layer.to_fold() for layer in layers], dtype)
        except RtkError as error:  # of several precisions, or on several devices
            raise NotApplicable(str(error)) from error
        self._consumers = structure.consumers()
        stem = BFloat16Stem if dtype == torch.bfloat16 else PlainStem
        self._stem = stem(structure, self.device, dtype)
        self.live: dict[int, tuple[Tensor, float]] = {}

    def refold(self) -> None:
        """Read the network's weights and statistics anew: before the first run, on any change."""
        with torch.no_grad():
            self._folded = self._plan()
            self._stem.refold(self._folded[0])

    def weight(self, number: int) -> Tensor:
        """Return the folded weight of a layer, (K, C, R, S)."""
        return self._folded[number].weight

    def infer(self, x: Tensor, run: Run | None = None) -> Tensor:
        """Return the last activation of images (N, 3, H, W), without gradients or autocast.

        `run` does a step in place of `convolve`.
        """
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return self._walk(self._stem.infer(x), run or self.convolve)

    def convolve(self, step: Step, source: Tensor, residual: Tensor | None) -> Tensor:
        """Return a step's value."""
        value = self._convolve(step, source, residual, live=self.live.get(step.out))
        assert isinstance(value, Tensor)
        return value

    def _convolve(
        self,
        step: Step,
        source: Tensor,
        residual: Tensor | None,
        *,
        live: tuple[Tensor, float] | None = None,
        save_positive: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        layer, folded = self.structure.layers[step.out], self._folded[step.out]
        words: dict[str, Any] = {} if live is None else {"live": live[0], "density": live[1]}
        return fused_conv2d(
            source,
            folded.weight,
            folded.bias,
            residual,
            relu=step.relu,
            stride=layer.stride,
            padding=layer.padding,
            save_positive=save_positive,
            **words,
        )

    def _walk(self, first: Tensor, run: Run) -> Tensor:
        """Return the last value; each lives no longer than somebody is left to read it."""
        values, unread = {0: first}, list(self._consumers)
        out = first
        del first

        def read(number: int) -> Tensor:
            unread[number] -= 1
            return values[number] if unread[number] else values.pop(number)

        for step in self.structure.steps:
            source = read(step.source)
            residual = None if step.residual is None else read(step.residual)
            out = run(step, source, residual)
            del source, residual
            values[step.out] = out
        return out
