"""fuse: a network for inference, a launch a layer, that skips dead blocks of its weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rtk.cuda_graph import GraphChoice, Graphed, model_state
from rtk.errors import RtkError
from rtk.nn._fused.layers import NotApplicable
from rtk.nn._fused.program import ForwardProgram
from rtk.nn._fused.reader import recognise
from rtk.nn._fused.structure import Step
from rtk.nn._graph_ms import graph_ms
from rtk.ops import live_tiles, tuning
from rtk.ops.live_tiles import BLOCK

_GAIN = 0.97  # of the time of the whole convolution: what skipping must undercut
_TOLERANCE = 0.05  # of the logits' length: what bf16 may do to them


class FusedModel(nn.Module):
    """What `fuse` returns.

    Attributes:
        skipping: names of the convolutions whose dead blocks of weights are skipped.
    """

    def __init__(self, program: ForwardProgram, graph: GraphChoice) -> None:
        super().__init__()
        self._program = program
        self._tail = program.structure.tail
        self._forward = _GraphedForward(self, graph)
        self.skipping: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, fp32, of images (N, 3, H, W), floating; without gradients."""
        return self._forward.run(x)

    def refold(self) -> None:
        """Read the network's weights and masks anew.

        Which blocks are skipped is kept up to date; whether it pays is not measured again.
        """
        self._program.refold()
        for number, (words, _) in self._program.live.items():
            words.copy_(live_tiles(self._program.weight(number)))

    def _run(self, x: Tensor) -> Tensor:
        dtype = self._program.dtype
        last = self._program.infer(x)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            if dtype == torch.float64:
                return self._tail(last)
            with torch.autocast(x.device.type, dtype=dtype, enabled=dtype == torch.bfloat16):
                return self._tail(last).float()

    def _choose(self, x: Tensor) -> None:
        """Measure for each layer with dead blocks whether skipping them pays."""
        program = self._program

        def run(step: Step, source: Tensor, residual: Tensor | None) -> Tensor:
            def calls(count: int) -> None:
                for _ in range(count):
                    program.convolve(step, source, residual)

            live = _live(program.weight(step.out))
            if live is not None:
                whole = graph_ms(calls)
                program.live[step.out] = live
                if graph_ms(calls) < _GAIN * whole:
                    self.skipping.append(program.structure.layers[step.out].name)
                else:
                    del program.live[step.out]
            return program.convolve(step, source, residual)

        with tuning():
            program.infer(x, run)


class _GraphedForward(Graphed):
    def __init__(self, model: FusedModel, graph: GraphChoice) -> None:
        super().__init__("fuse", graph)
        self._run = model._run
        self._tail = model._tail

    def eager(self, *inputs: Tensor) -> Tensor:
        return self._run(*inputs)

    recorded = eager

    def state(self) -> list[object]:
        return model_state(self._tail)

    def refresh(self) -> None:
        """Nothing changes from call to call but the images."""


def fuse(
    model: nn.Module,
    images: Tensor,
    *,
    dtype: torch.dtype = torch.bfloat16,
    graph: GraphChoice = "auto",
) -> FusedModel:
    """Return a network for inference: what `model` computes in eval mode, faster.

    Batch norms and masks are folded into the weights, bias, skip connection and ReLU are part of
    the convolution, and where weights of whole blocks of 64 x 64 channels are dead (a ticket of
    `block-64` granularity, say) they are neither read nor multiplied, if that is faster on this
    GPU, which is measured on `images`. Calls of one shape are replayed as a CUDA graph.

    Args:
        model: ResNet-like (convolution, batch norm, skip connections, ReLU), in eval mode and fp32;
            it is not changed, and its weights are read now, and again by `FusedModel.refold`.
        images: (N, 3, H, W), floating, on the model's device, of the size that it will meet: the
            logits are compared with the model's, and layers are timed on them.
        dtype: of weights and activations: bf16, for which there are GPU kernels, or fp32 and fp64
            on any device, which only show what is computed.
        graph: "auto" captures on a GPU and falls back with one warning; False never captures.

    Returns:
        A module; called with images it returns logits in fp32 (fp64 for fp64).

    Raises:
        RtkError: if the model is not ResNet-like or not in eval mode, saying what and where; if its
            logits differ by more than bf16 explains.
    """
    if images.dim() != 4 or images.shape[1] != 3 or not len(images):
        raise RtkError(
            f"fuse: images must be (N, 3, H, W), N at least 1, got {tuple(images.shape)}"
        )
    if any(module.training for module in model.modules()):
        raise RtkError("fuse: the model is in training mode; call model.eval() first")
    try:
        program = ForwardProgram(recognise(model), dtype)
    except NotApplicable as error:
        raise RtkError(
            f"fuse: {type(model).__name__} cannot be fused: {error}; use the model as it is"
        ) from error
    if images.device != program.device:
        raise RtkError(
            f"fuse: the images are on {images.device} and the model on {program.device}; move one"
        )
    program.refold()
    fused = FusedModel(program, graph).eval()
    if images.is_cuda and dtype == torch.bfloat16:
        fused._choose(images)
    _compare(fused._run(images), model, images)
    return fused


def _live(weight: Tensor) -> tuple[Tensor, float] | None:
    """Return the words of a weight and the share of live blocks, or None where nothing is skipped.

    It synchronises.
    """
    k, c, taps, _ = weight.shape
    if k % BLOCK or taps > 3 or c > BLOCK**2:
        return None
    words = live_tiles(weight)
    bits = torch.arange(-(-c // BLOCK), device=words.device)
    share = ((words[..., None] >> bits) & 1).float().mean().item()
    return (words, share) if share < 1 else None


def _compare(logits: Tensor, model: nn.Module, images: Tensor) -> None:
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        weights = next(model.parameters()).dtype
        expected = model(images.to(weights)).double()
    far = ((logits.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()
    if not far <= _TOLERANCE:
        raise RtkError(
            f"fuse: the logits differ by {far:.2g} of their length from the model's, more than "
            "bf16 explains; use the model as it is, and please report this"
        )
