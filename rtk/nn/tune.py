"""tune: measure, layer by layer, by which path a masked convolution is fastest.

The paths are those of `rtk.ops.masked_conv2d.masked_conv2d_prepared`: cuDNN on prepared weights,
"skip" for blocks that are all zero, "sparse" for weights that are very sparse; forward, input and
weight gradient choose apart, the last between the first two. What is measured is kept with the
layer, by input shape, and in a file, so that a second process does not measure again. A layer that
was not tuned runs cuDNN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rtk.errors import RtkError
from rtk.nn._layer_times import LayerTimes, TimesFile
from rtk.nn._path_times import convolution, path_times, rehearse
from rtk.nn.masked_conv2d import MaskedConv2d
from rtk.ops import live_tiles, prepare_weight, sparse_columns
from rtk.ops._layout import memory_format
from rtk.ops.live_tiles import BLOCK
from rtk.ops.sparse_columns import TAPS, listed_share


def tune(model: nn.Module, *inputs: Tensor) -> list[LayerTimes]:
    """Let every masked convolution of `model` take what is fastest, in bf16, on these shapes.

    The model runs once, in the mode that it is in and without gradients; batch norm in train mode
    updates its statistics, so tune in eval mode. Then each layer is timed on random activations of
    its shape, as CUDA graph replays. Tickets whose dead weights fill whole blocks of 64 x 64
    channels gain from it, and those of which 97 % and more is dead; others stay with cuDNN. Weights
    must be fp32 in channels_last for their gradient to gain. Where launches are captured in a CUDA
    graph all that is gained is taken; in eager mode only what exceeds the Python that it costs
    (`LayerTimes.taken_eagerly`). Tune again when the mask has changed a lot: a choice that is out
    of date costs time, never exactness.

    Args:
        model: on a GPU; its masked convolutions' masks are bool.
        inputs: what it is called with.

    Returns:
        One `LayerTimes` a masked convolution and input shape, in the order of the forward; those
        with padding "same" or "valid", or with other values than zeros around, are left out, as
        they are always cuDNN's.

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
        if isinstance(layer, MaskedConv2d)
        and not isinstance(layer.padding, str)
        and layer.padding_mode == "zeros"
    }
    file = TimesFile(device)
    found = []
    for layer, shape in _shapes(model, list(names), inputs):
        with torch.no_grad():
            weight = prepare_weight(
                layer.weight, layer.mask, dtype=torch.bfloat16, channels_last=True
            )
            live = _live_share(weight)
            key = _key(layer, weight, live)
            times = file.get(key, names[layer], shape)
            if times is None:
                times = LayerTimes(
                    names[layer], shape, live, path_times(layer, weight, shape, live)
                )
            else:
                rehearse(layer, weight, shape, live, times.taken)
        file.put(key, times)
        layer._paths_for[shape], layer._density = times.taken, live
        layer._eager_paths_for[shape] = times.taken_eagerly
        found.append(times)
    file.save()
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


def _live_share(weight: Tensor) -> float:
    """Return the share of live blocks; synchronises."""
    if weight.shape[1] > BLOCK**2:  # more than a word holds
        return 1.0
    bits = torch.arange(-(-weight.shape[1] // BLOCK), device=weight.device)
    return ((live_tiles(weight)[..., None] >> bits) & 1).float().mean().item()


def _key(layer: MaskedConv2d, weight: Tensor, live: float) -> str:
    """Return what a time depends on, but for the input's shape; synchronises."""
    size = tuple(weight.shape)
    listed = 1.0
    if max(size[2:]) <= TAPS:
        listed = listed_share(sparse_columns(weight), size)
    formats = [
        f"{str(tensor.dtype).removeprefix('torch.')} {memory_format(tensor)}"
        for tensor in (layer.weight, layer.mask)
    ]
    kinds = f"weight {formats[0]} mask {tuple(layer.mask.shape)} {formats[1]}"
    return f"{size} {convolution(layer)} live {live:.2g} listed {listed:.2g} {kinds}"
