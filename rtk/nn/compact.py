"""compact: a network whose pruned channels are gone, not masked, with the same outputs."""

from __future__ import annotations

import copy
from typing import Any, Literal, overload

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rtk.errors import RtkError
from rtk.nn._channel_reader import read
from rtk.nn._compaction import (
    CompactedLayer,
    CompactionReport,
    counted_macs,
    idle_outputs,
    layers_of,
    size_of,
)
from rtk.nn._narrow import narrow
from rtk.nn._needed import kept_slots
from rtk.nn._trace import NotTraceable, trace
from rtk.nn.convert import fold

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_TOLERANCE = 2e-2  # of the largest output: what is wrong is wrong by more, also in half precision


@overload
def compact(
    model: nn.Module,
    example_input: Any = None,
    *,
    multiple_of: int = 1,
    report: Literal[False] = False,
) -> nn.Module: ...


@overload
def compact(
    model: nn.Module,
    example_input: Any = None,
    *,
    multiple_of: int = 1,
    report: Literal[True],
) -> tuple[nn.Module, CompactionReport]: ...


def compact(
    model: nn.Module,
    example_input: Any = None,
    *,
    multiple_of: int = 1,
    report: bool = False,
) -> nn.Module | tuple[nn.Module, CompactionReport]:
    """Return a physically smaller copy of `model` that has its outputs in eval mode.

    Masks are folded into the weights, then channels are removed until nothing changes:

    - what a convolution or linear layer writes and nothing reads, because every reader's weights
      for it are 0 (or masked), or its reader's own output is gone;
    - what is a constant c in eval mode: an output without weights is its bias, which batch norm
      makes bias - mean * scale, and an activation another c. Where c is 0 it just goes. Where it
      is not, a reader that does not pad with zeros (1x1, linear) takes sum(c * w) into its bias,
      or into the running mean of the batch norm behind it. At the borders of a padded convolution
      fewer taps see the constant, so there *one* of the constant channels that it reads stays, and
      its filter becomes the sum over all of them of c_i / c_one * w_i: exact everywhere.

    Channels that are added (a residual stream) go only together: where every writer's is constant,
    or no reader is left. Otherwise a pruned output in a stream stays, as zeros, and is counted as
    `idle` in the report. Depthwise convolutions follow their channels; grouped ones, modules that
    are used twice or share parameters, and what is not understood (views, normalisation over
    channels, attention) keep the channels that they read. Every layer keeps an output.

    Classes, forwards, module names and state_dict keys are those of `model`, with plain
    convolutions for masked ones; only shapes change (a layer without a bias gets one where a
    constant has no other place). A model's `spec` still names the width it was built with, so a
    compact model is saved as a state_dict of its own, not as a checkpoint of rtk.

    In train mode batch norm takes a pruned channel's constant from the batch: it is its bias. So
    outputs and the statistics of the channels that stay are the same there, too, where the running
    mean of what is pruned is 0, as training with the mask leaves it, and differ elsewhere: the
    constants of eval mode are built in here. Zeros that stay in a weight are free to grow, so mask
    them again before training on.

    Args:
        model: any network that torch.fx can trace; it is not changed. The copy has its modes.
        example_input: images (N, 3, H, W), or a tuple of the forward's arguments. With it the two
            models are compared on it, and the report has FLOPs.
        multiple_of: keep as many pruned channels as make each layer's outputs a multiple of this
            (or all of them). 8 is what tensor cores and rtk's GPU kernels take.
        report: return (model, CompactionReport) instead.

    Raises:
        RtkError: if the model cannot be copied or traced, saying what to do; if multiple_of is
            below 1; if the outputs on `example_input` differ.
    """
    if multiple_of < 1:
        raise RtkError(f"compact: expected multiple_of of at least 1, got {multiple_of}")
    small = fold(_copied(model))
    modes = {module: module.training for module in small.modules()}
    small.eval()
    before = {name: size_of(layer) for name, layer in layers_of(small).items()}
    parameters = sum(p.numel() for p in small.parameters())
    expected, macs_before = _run(small, example_input)
    left = _narrow(small, multiple_of)
    actual, macs_after = _run(small, example_input)
    _check_same(actual, expected)
    for module, training in modes.items():
        module.training = training
    if not report:
        return small
    layers = [
        CompactedLayer(
            name,
            before[name],
            size_of(layer),
            idle_outputs(layer),
            macs_before.get(name),
            macs_after.get(name),
        )
        for name, layer in layers_of(small).items()
    ]
    return small, CompactionReport(
        layers, left, parameters, sum(p.numel() for p in small.parameters())
    )


def _copied(model: nn.Module) -> nn.Module:
    if isinstance(model, _WRAPPERS):
        raise RtkError(f"compact: the model is a {type(model).__name__}; pass its .module")
    if hasattr(model, "_orig_mod"):
        raise RtkError("compact: the model is compiled; pass the one that was given to compile")
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise RtkError(
            f"compact: the model cannot be copied ({str(error).splitlines()[0]}); where "
            "torch.nn.utils.prune pruned it, make that permanent with prune.remove, or apply "
            "Ticket.from_torch_prune(model) to a fresh model"
        ) from error


def _narrow(model: nn.Module, multiple_of: int) -> dict[str, str]:
    """Make a model in eval mode narrower, in place; return what was not understood."""
    try:
        with trace(model) as traced:
            code = _code(traced)
            reading = read(traced)
        narrow(reading, kept_slots(reading, multiple_of))
        with trace(model) as traced:
            same = _code(traced) == code
    except NotTraceable as error:
        raise RtkError(
            f"compact: the model cannot be followed: {error}. Remove hooks and "
            "parametrizations first; of a model whose forward depends on its input, compact the "
            "part that does not (its backbone) and put it back"
        ) from error
    if not same:
        raise RtkError(
            "compact: the model's forward depends on the sizes of its layers, so it does something "
            "else with smaller ones; compact the parts whose forward does not"
        )
    return reading.left


def _code(traced: fx.GraphModule) -> list[str]:
    return [f"{n.op} {n.target} {n.args} {n.kwargs}" for n in traced.graph.nodes]


def _run(model: nn.Module, example_input: Any) -> tuple[list[Tensor], dict[str, int]]:
    """Return a model's output tensors and its multiply-accumulates, layer by layer."""
    if example_input is None:
        return [], {}
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    with torch.no_grad(), counted_macs(model) as macs:
        leaves = pytree.tree_leaves(model(*inputs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)], macs


def _check_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        scale = b.abs().max().item() if b.numel() else 0.0
        if a.shape != b.shape or not torch.allclose(
            a, b, rtol=0, atol=_TOLERANCE * scale, equal_nan=True
        ):
            raise RtkError(
                "compact: the smaller model's outputs on example_input differ from the model's; "
                "does its forward draw random numbers or keep state? Otherwise please report it"
            )
