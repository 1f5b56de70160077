"""Make the layers of a network narrower, once it is known which channels stay."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rtk.nn._channels import Mixing, PerChannel, Reading, is_offset
from rtk.nn._needed import representative
from rtk.ops._layout import memory_format


def narrow(reading: Reading, kept: Tensor) -> None:
    """Remove, in place, the channels that do not stay.

    Args:
        reading: the network's channels.
        kept: (slots,) bool.
    """
    with torch.no_grad():
        for layer in reading.mixing:
            _narrow_mixing(layer, kept)
        for other in reading.per_channel:
            _narrow_per_channel(other, kept[other.slots])


def _narrow_mixing(layer: Mixing, kept: Tensor) -> None:
    module = layer.module
    rows = kept[layer.out]
    columns = torch.ones_like(layer.reads[0]) if layer.source is None else kept[layer.source]
    gone = ~columns & is_offset(layer.constant)
    if layer.reads[rows][:, gone].any():
        if layer.borders:
            _merge(layer, gone)
        else:
            _shift(layer, layer.sum_of(gone))
    if rows.all() and columns.all():
        return
    _set(module, "weight", module.weight, rows, columns)
    _set(module, "bias", module.bias, rows)
    if isinstance(module, nn.Conv2d):
        module.in_channels, module.out_channels = int(columns.sum()), int(rows.sum())
    else:
        module.in_features, module.out_features = int(columns.sum()), int(rows.sum())


def _merge(layer: Mixing, gone: Tensor) -> None:
    """Let one constant channel stand for others: exact at the borders, where it ends as they do."""
    weight = layer.module.weight
    one = representative(layer)
    ratios = (layer.constant[gone] / layer.constant[one]).to(weight.device)
    others = weight.double()[:, gone.to(weight.device)]
    extra = torch.einsum("kcrs,c->krs", others, ratios)
    weight[:, one] = (weight[:, one].double() + extra).to(weight.dtype)


def _shift(layer: Mixing, by: Tensor) -> None:
    """Add (K,) constants to a layer's outputs, in its bias or in the batch norm behind it."""
    module = layer.module
    if module.bias is not None:
        module.bias += by.to(module.bias)
    elif layer.norm is not None:
        mean = layer.norm.get_buffer("running_mean")
        mean -= by.to(mean)
    else:
        module.bias = nn.Parameter(by.to(module.weight), module.weight.requires_grad)


def _narrow_per_channel(layer: PerChannel, stays: Tensor) -> None:
    module = layer.module
    if stays.all():
        return
    for name, parameter in list(module.named_parameters(recurse=False)):
        _set(module, name, parameter, stays)
    for name in ("running_mean", "running_var"):
        if (values := module._buffers.get(name)) is not None:
            setattr(module, name, values[stays.to(values.device)])
    count = int(stays.sum())
    if isinstance(module, nn.Conv2d):
        module.in_channels = module.out_channels = module.groups = count
    else:
        module.num_features = count  # type: ignore[assignment]


def _set(
    module: nn.Module,
    name: str,
    value: Tensor | None,
    rows: Tensor,
    columns: Tensor | None = None,
) -> None:
    """Give a module the part of a parameter that stays."""
    if value is None:
        return
    part = value.detach()[rows.to(value.device)]
    if columns is not None:
        part = part[:, columns.to(value.device)]
    part = part.contiguous(memory_format=memory_format(value))
    setattr(module, name, nn.Parameter(part, value.requires_grad))
