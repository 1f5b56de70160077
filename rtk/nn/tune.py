"""tune: measure, layer by layer, whether skipping dead blocks of weights beats cuDNN.

What is measured is kept with the layer, by input shape, and in a file, so that a second process
does not measure again. A layer that was not tuned runs cuDNN on prepared weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rtk._version import __version__
from rtk.errors import RtkError
from rtk.nn.masked_conv2d import MaskedConv2d
from rtk.ops import live_tiles, prepare_weight, tuning, turn_filter
from rtk.ops.fused_conv2d import fused_conv2d, fused_conv2d_bwd_input
from rtk.ops.masked_conv2d import why_not_skip
from rtk.runs import atomic_write

_GAIN = 0.97  # of cuDNN's time: what must be undercut
_CALLS, _REPLAYS = 10, 5


@dataclass(frozen=True)
class LayerTimes:
    """Of one layer on one input shape: milliseconds on prepared weights, and what is taken.

    Attributes:
        layer: its name in the model.
        shape: (N, C, H, W) of its input.
        live: share of the 64 x 64 blocks of weights that are not all zero.
        cudnn, skip: milliseconds of (forward, input gradient); None: cannot be done.
    """

    layer: str
    shape: tuple[int, ...]
    live: float
    cudnn: tuple[float, float]
    skip: tuple[float | None, float | None]

    @property
    def skips(self) -> tuple[bool, bool]:
        """Whether (forward, input gradient) skip dead blocks."""
        forward, bwd_input = (
            skip is not None and skip < _GAIN * cudnn
            for skip, cudnn in zip(self.skip, self.cudnn, strict=True)
        )
        return forward, bwd_input


def tune(model: nn.Module, *inputs: Tensor) -> list[LayerTimes]:
    """Let every masked convolution of `model` take what is faster, in bf16, on these shapes.

    The model runs once, in the mode that it is in and without gradients; batch norm in train mode
    updates its statistics, so tune in eval mode. Then each layer is timed on random activations of
    its shape, as CUDA graph replays. Tickets whose dead weights fill whole blocks of 64 x 64
    channels gain from it; others stay with cuDNN. Tune again when the mask has changed a lot: a
    choice that is out of date costs time, never exactness.

    Args:
        model: on a GPU; its masked convolutions' masks are bool.
        inputs: what it is called with.

    Returns:
        One `LayerTimes` a masked convolution and input shape, in the order of the forward; those
        with padding "same" or "valid" are left out, as they are always cuDNN's.

    Raises:
        RtkError: if the model is not on a GPU, or a CUDA graph is being captured.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type != "cuda":
        raise RtkError(
            f"tune: the model is on {device}; what is faster is measured on a GPU: model.cuda()"
        )
    if torch.cuda.is_current_stream_capturing():
        raise RtkError("tune: a CUDA graph is being captured; tune before")
    names = {
        layer: name
        for name, layer in model.named_modules()
        if isinstance(layer, MaskedConv2d) and not isinstance(layer.padding, str)
    }
    shapes = _shapes(model, list(names), inputs)
    memory = _Memory(device)
    found = []
    for layer, shape in shapes:
        times = memory.get(layer, shape, names[layer]) or _measure(layer, shape, names[layer])
        memory.put(layer, shape, times)
        layer._skips_for[shape] = times.skips
        found.append(times)
    memory.save()
    return found


def _shapes(
    model: nn.Module, layers: Sequence[MaskedConv2d], inputs: tuple[Tensor, ...]
) -> list[tuple[MaskedConv2d, tuple[int, ...]]]:
    """Run the model and return what its masked convolutions were given."""
    seen: dict[tuple[MaskedConv2d, tuple[int, ...]], None] = {}

    def look(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, MaskedConv2d)
        if given[0].dim() == 4 and given[0].numel():
            seen[layer, tuple(given[0].shape)] = None

    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return list(seen)


def _measure(layer: MaskedConv2d, shape: tuple[int, ...], name: str) -> LayerTimes:
    conv = *_geometry(layer), False, [0, 0], layer.groups
    with torch.no_grad():
        prepared = prepare_weight(
            layer.weight, layer.mask, dtype=torch.bfloat16, channels_last=True
        )
        x = torch.randn(shape, device=prepared.device, dtype=torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last)
        grad = torch.randn_like(torch.ops.aten.convolution(x, prepared, None, *conv))
        turned = turn_filter(prepared)
        options: dict[str, Any] = {"stride": conv[0][0], "padding": conv[1][0]}

        def cudnn() -> Tensor:
            return torch.ops.aten.convolution(x, prepared, None, *conv)

        def cudnn_bwd_input() -> Tensor:
            return torch.ops.aten.convolution_backward(
                grad, x, prepared, None, *conv, [True, False, False]
            )[0]

        def skip() -> Tensor:
            return fused_conv2d(x, prepared, live=live_tiles(prepared), **options)

        def skip_bwd_input() -> Tensor:
            words = live_tiles(turned)
            return fused_conv2d_bwd_input(grad, turned, shape[2:], live=words, **options)

        skips: tuple[float | None, float | None] = (None, None)
        if _why_not(layer) is None:
            with tuning():
                skips = _graph_ms(skip), _graph_ms(skip_bwd_input)
        times = _graph_ms(cudnn), _graph_ms(cudnn_bwd_input)
        return LayerTimes(name, shape, _share(live_tiles(prepared), prepared), times, skips)


def _why_not(layer: MaskedConv2d) -> str | None:
    """Return why its dead blocks cannot be skipped by the GPU's kernel."""
    if layer.mask.dtype != torch.bool:
        return "its mask is learned"
    if torch.cuda.get_device_capability(layer.weight.device) != (9, 0):
        return "the kernel is for compute capability 9.0"
    k, c, taps, _ = layer.weight.shape
    if c % 64 or k % 64 or taps > 3:
        return "the kernel takes channels in multiples of 64, and filters of up to 3x3"
    return why_not_skip(layer.weight, *_geometry(layer), layer.groups)


def _geometry(layer: MaskedConv2d) -> tuple[list[int], list[int], list[int]]:
    padding = [0, 0] if layer.padding_mode != "zeros" else list(layer.padding)
    return list(layer.stride), padding, list(layer.dilation)  # type: ignore[return-value]


def _share(live: Tensor, weight: Tensor) -> float:
    """Return the share of live blocks; synchronises."""
    bits = torch.arange(-(-weight.shape[1] // 64), device=live.device)
    return ((live[..., None] >> bits) & 1).float().mean().item()


def _graph_ms(run: Callable[[], object]) -> float:
    """Return milliseconds of a call, as part of a replayed CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            run()
    graph.replay()
    times = []
    for _ in range(_REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / _CALLS)
    return min(times)


class _Memory:
    """What was measured before: a JSON file, under everything that a time depends on."""

    def __init__(self, device: torch.device) -> None:
        root = os.environ.get("RTK_CACHE") or Path.home() / ".cache" / "rtk"
        self._path = Path(root) / "conv-times.json"
        self._machine = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
        self._known: dict[str, Any] = {}
        with suppress(OSError, ValueError):  # none yet, or not ours: measured again
            self._known = dict(json.loads(self._path.read_text()))

    def get(self, layer: MaskedConv2d, shape: tuple[int, ...], name: str) -> LayerTimes | None:
        known = self._known.get(self._key(layer, shape))
        if known is None:
            return None
        values = {key: tuple(known[key]) for key in ("cudnn", "skip")}
        return LayerTimes(name, shape, known["live"], **values)

    def put(self, layer: MaskedConv2d, shape: tuple[int, ...], times: LayerTimes) -> None:
        self._known[self._key(layer, shape)] = {
            key: value for key, value in asdict(times).items() if key not in ("layer", "shape")
        }

    def save(self) -> None:
        atomic_write(self._path, json.dumps(self._known, indent=1, sort_keys=True))

    def _key(self, layer: MaskedConv2d, shape: tuple[int, ...]) -> str:
        with torch.no_grad():
            words = live_tiles((layer.mask != 0).expand(layer.weight.shape))
        share = round(_share(words, layer.weight), 2)
        conv = *_geometry(layer), layer.groups
        sizes = f"{shape} {tuple(layer.weight.shape)} {conv} {share}"
        return f"rtk {__version__}, {self._machine}, {sizes}"
