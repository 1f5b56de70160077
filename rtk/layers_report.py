"""`rtk doctor --layers`: which path each masked layer takes, and how fast it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from rtk.errors import RtkError
from rtk.models import MODELS, Classifier, ModelSpec, create, is_from_library
from rtk.nn import LayerTimes, MaskedConv2d, MaskedLinear, tune
from rtk.runs import find_artefact
from rtk.ticket import TICKET, Ticket
from rtk.train import Checkpoint

_FIELDS = ("layer", "input", "filters", "kept", "blocks")
_WAYS = ("forward", "input gradient", "weight gradient")
_HEADER = (*_FIELDS, *(cell for way in _WAYS for cell in (way, "ms", "dense")))
_NAMES = {0, *range(len(_FIELDS), len(_HEADER), 3)}  # columns of text, which start at the left


def describe_layers(
    model: str, ticket: str, *, image_size: int | None = None, batch_size: int = 128
) -> str:
    """Measure the masked layers of a network, as `rtk.nn.tune` does, and return a table.

    Args:
        model: a run's folder or its checkpoint.safetensors; or an architecture, e.g. resnet50 or
            torchvision:densenet121, which gets the ticket's stem and width, and random weights.
        ticket: a run's folder or its ticket.safetensors.
        image_size: height and width of the images in pixels; None is 32 for a 3x3 stem, else 224.
        batch_size: images at a time.

    Returns:
        A line for each masked layer: its shape; the share of its weights that the ticket
        keeps, and of its 64 x 64 blocks that are not all zero; and of the forward, of the input's
        and of the weight's gradient the path taken, its milliseconds, and those of the dense
        layer by cuDNN or cuBLAS, where the weight's gradient is masked too. Below, the sums.

    Raises:
        RtkError: without a GPU; for a size below 1; for files that cannot be read or do not fit
            together; for a ticket without convolutions.
    """
    if not torch.cuda.is_available():
        raise RtkError(
            "doctor --layers: expected a GPU to time the layers on, torch can use none; run it on "
            "a machine that has one (`rtk doctor` alone says what torch sees here)"
        )
    for name, value in (("image_size", image_size), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise RtkError(f"doctor --layers: {name}: expected at least 1, got {value}")
    masks = Ticket.load(find_artefact(ticket, TICKET))
    network = _network(model, masks)
    size = image_size or (32 if network.spec.stem == "3x3" else 224)
    masked: nn.Module = masks.apply(network).eval().cuda()
    masked.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.rand(batch_size, 3, size, size, device="cuda")
    found = tune(masked, images.contiguous(memory_format=torch.channels_last))
    title = (
        f"{model}, {masks.granularity} ticket, {masks.sparsity:.1%} zeros: {batch_size} images of "
        f"{size} x {size} on {torch.cuda.get_device_name()}, bf16, prepared weights"
    )
    return f"{title}\n\n{table(masked, found)}"


def _network(model: str, ticket: Ticket) -> Classifier:
    """Return the network of a checkpoint, or a fresh one of the architecture `model`."""
    library = is_from_library(model)
    if Path(model).exists() or not (library or model in MODELS.names()):
        return Checkpoint.load(model).build_model()
    told = ticket.meta.get("model") or {}
    stem, width = told.get("stem", "own" if library else "7x7"), told.get("width", 1.0)
    return create(ModelSpec(model, stem, width, 10, (0.5,) * 3, (0.25,) * 3))


def table(model: nn.Module, measured: Sequence[LayerTimes]) -> str:
    """Return the table of `describe_layers`: of a masked model, and what `tune` found of it."""
    rows = [_row(model.get_submodule(times.layer), times) for times in measured]
    seen = {times.layer for times in measured}
    for name, layer in model.named_modules():
        if isinstance(layer, MaskedConv2d) and name not in seen:  # it is cuDNN's, whatever it holds
            cells = [name, "", _filters(layer), _kept(layer), ""]
            rows.append([*cells, *["cudnn", "", ""] * len(_WAYS)])
    if not rows:
        raise RtkError(
            "doctor --layers: the ticket masks no convolution; expected one as `rtk draw` makes it"
        )
    return _aligned([[*_HEADER], *rows, _sums(measured)])


def _row(layer: nn.Module, times: LayerTimes) -> list[str]:
    cells = [times.layer, _by(times.shape), _filters(layer), _kept(layer), f"{times.live:.0%}"]
    for way, path in enumerate(times.taken):
        cells += [path, _ms(times.times[path][way]), _ms(times.times[times.dense][way])]
    return cells


def _sums(measured: Sequence[LayerTimes]) -> list[str]:
    cells = ["all", *[""] * (len(_FIELDS) - 1)]
    for way in range(len(_WAYS)):
        taken = sum(times.times[times.taken[way]][way] or 0.0 for times in measured)
        cells += [
            "",
            _ms(taken),
            _ms(sum(times.times[times.dense][way] or 0.0 for times in measured)),
        ]
    return cells


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i in _NAMES else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _filters(layer: nn.Module) -> str:
    assert isinstance(layer, MaskedConv2d | MaskedLinear)
    return _by(layer.weight.shape)


def _kept(layer: nn.Module) -> str:
    assert isinstance(layer, MaskedConv2d | MaskedLinear)
    return f"{1 - layer.sparsity:.1%}"


def _ms(milliseconds: float | None) -> str:
    return "" if milliseconds is None else f"{milliseconds:.4f}"
