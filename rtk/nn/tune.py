"""tune: measure, layer by layer, by which path a masked layer is fastest.

A convolution's paths are those of `rtk.ops.masked_conv2d.masked_conv2d_prepared`: cuDNN on prepared
weights, "skip" for blocks that are all zero, "sparse" for weights that are very sparse, and for 1x1
filters "blocks32", "blocks64" and "blocks128", which are `rtk.ops.block_matmul`; a linear layer's
are cuBLAS and the same products. Forward, input and weight gradient choose apart, the last not
"sparse". What is measured is kept with the layer, by input shape, and in a file, so that a second
process does not measure again. A layer that was not tuned runs cuDNN or cuBLAS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rtk.errors import RtkError
from rtk.nn._layer_times import LayerTimes, TimesFile
from rtk.nn._linear_times import linear_times, rehearse_linear
from rtk.nn._path_times import convolution, path_times, rehearse
from rtk.nn.masked_conv2d import MaskedConv2d
from rtk.nn.masked_linear import MaskedLinear
from rtk.ops import live_tiles, prepare_weight, sparse_columns
from rtk.ops._block_paths import BLOCK_PATHS, blocks_of, why_not_blocks
from rtk.ops._layout import memory_format
from rtk.ops.live_tiles import BLOCK
from rtk.ops.sparse_columns import TAPS, listed_share


def tune(model: nn.Module, *inputs: Tensor) -> list[LayerTimes]:
    """Let every masked layer of `model` take what is fastest, in bf16, on these shapes.

    The model runs once, in the mode that it is in and without gradients; batch norm in train mode
    updates its statistics, so tune in eval mode. Then each layer is timed on random activations of
    its shape, as CUDA graph replays. Tickets whose dead weights fill whole blocks of 64 x 64
    channels (for 1x1 filters and linear layers also of 32 x 32 or 128 x 128) gain from it, and
    those of which 97 % and more is dead; others stay with cuDNN. Weights of convolutions must be
    fp32 in channels_last for their gradient to gain. Where launches are captured in a CUDA
    graph all that is gained is taken; in eager mode only what exceeds the Python that it costs
    (`LayerTimes.taken_eagerly`). Tune again when the mask has changed a lot: a choice that is out
    of date costs time, never exactness.

    Args:
        model: on a GPU; its masked layers' masks are bool.
        inputs: what it is called with.

    Returns:
        One `LayerTimes` a masked layer and input shape, in the order of the forward; convolutions
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
    names = {layer: name for name, layer in model.named_modules() if _has_paths(layer)}
    file = TimesFile(device)
    found = []
    for layer, shape in _shapes(model, list(names), inputs):
        assert isinstance(layer, MaskedConv2d | MaskedLinear)
        with torch.no_grad():
            times, densities = _times(layer, names[layer], shape, file)
        layer._paths_for[shape], layer._densities = times.taken, densities
        layer._eager_paths_for[shape] = times.taken_eagerly
        found.append(times)
    file.save()
    return found


def _has_paths(layer: nn.Module) -> bool:
    if isinstance(layer, MaskedConv2d):
        return not isinstance(layer.padding, str) and layer.padding_mode == "zeros"
    return isinstance(layer, MaskedLinear) and layer.weight.numel() > 0


def _times(
    layer: MaskedConv2d | MaskedLinear, name: str, shape: tuple[int, ...], file: TimesFile
) -> tuple[LayerTimes, dict[str, float]]:
    """Return what a layer takes, from the file or measured, and its shares of live blocks."""
    channels_last = isinstance(layer, MaskedConv2d)
    weight = prepare_weight(
        layer.weight, layer.mask, dtype=torch.bfloat16, channels_last=channels_last
    )
    densities = _live_shares(weight)
    key = _key(layer, weight, densities)
    known = file.get(key, name, shape)
    if isinstance(layer, MaskedConv2d):
        if known is not None:
            rehearse(layer, weight, shape, densities, known.taken)
        measured = path_times(layer, weight, shape, densities) if known is None else known.times
    else:
        if known is not None:
            rehearse_linear(layer, weight, shape, densities, known.taken)
        measured = linear_times(layer, weight, shape, densities) if known is None else known.times
    times = LayerTimes(name, shape, densities["skip"], measured)
    file.put(key, times)
    return times, densities


def _shapes(
    model: nn.Module, layers: Sequence[nn.Module], inputs: tuple[Tensor, ...]
) -> list[tuple[nn.Module, tuple[int, ...]]]:
    """Run the model and return what its masked layers were given."""
    seen: dict[tuple[nn.Module, tuple[int, ...]], None] = {}

    def look(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        images = isinstance(layer, MaskedConv2d)
        if given[0].numel() and (given[0].dim() == 4 or not images):
            seen[layer, tuple(given[0].shape)] = None

    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return list(seen)


def _live_shares(weight: Tensor) -> dict[str, float]:
    """Return by path the share of blocks that are alive; synchronises."""
    images = weight if weight.dim() == 4 else weight[..., None, None]
    shares = {"skip": 1.0}
    if images.shape[1] <= BLOCK**2:  # as many as a word holds
        bits = torch.arange(-(-images.shape[1] // BLOCK), device=weight.device)
        live = (live_tiles(images)[..., None] >> bits) & 1
        shares["skip"] = live.float().mean().item()
    if tuple(images.shape[2:]) == (1, 1):
        for path in BLOCK_PATHS:
            if why_not_blocks(path, *weight.shape[:2]) is None:
                shares[path] = blocks_of(path, weight).float().mean().item()
    return shares


def _key(layer: MaskedConv2d | MaskedLinear, weight: Tensor, densities: Mapping[str, float]) -> str:
    """Return what a time depends on, but for the input's shape; synchronises."""
    size = tuple(weight.shape)
    formats = [
        f"{str(tensor.dtype).removeprefix('torch.')} {memory_format(tensor)}"
        for tensor in (layer.weight, layer.mask)
    ]
    kinds = f"weight {formats[0]} mask {tuple(layer.mask.shape)} {formats[1]}"
    live = " ".join(f"{path} {share:.2g}" for path, share in densities.items())
    if isinstance(layer, MaskedLinear):
        return f"{size} linear bias {layer.bias is not None} live {live} {kinds}"
    listed = 1.0
    if max(size[2:]) <= TAPS:
        listed = listed_share(sparse_columns(weight), size)
    return f"{size} {convolution(layer)} live {live} listed {listed:.2g} {kinds}"
