"""What operators of a torch.fx trace do to each channel by itself, and to its constant."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rtk.nn.max_pool2d import MaxPool2d

_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)  # in eval mode
_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardtanh, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU),
    *(nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign),
)
_POOLS = (MaxPool2d, nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_RESIZES = (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)

_ACTIVATION_FUNCTIONS: tuple[Any, ...] = (
    *(torch.relu, torch.relu_, torch.sigmoid, torch.tanh, F.relu, F.relu_, F.relu6, F.leaky_relu),
    *(F.hardtanh, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.hardswish, F.hardsigmoid),
    *(F.sigmoid, F.tanh, "relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_"),
)
_POOL_FUNCTIONS: tuple[Any, ...] = (
    *(F.max_pool2d, F.adaptive_max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d),
)
_ADDS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
_PRODUCTS: tuple[Any, ...] = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_IN_PLACE: tuple[Any, ...] = (operator.iadd, operator.imul)


@dataclass(frozen=True)
class Mapped:
    """An activation's constants after an operator, and whether it wrote them where it read."""

    constant: Tensor
    in_place: bool = False


def apply(node: fx.Node, module: nn.Module | None, constant: Tensor, layout: str) -> Mapped | None:
    """Return what an operator makes of constants (C,); None where it is not one of those known.

    Args:
        node: reads the activation as its first argument.
        module: that the node calls, in eval mode; None where it calls a function.
        constant: (C,) float64, NaN where a channel varies.
        layout: of the activation.
    """
    if _is_identity(node, module):
        return Mapped(constant, in_place=True)
    if type(module) in _ACTIVATIONS or (module is None and node.target in _ACTIVATION_FUNCTIONS):
        return _activated(node, module, constant)
    if layout != "map":
        return None
    if type(module) in _POOLS or (module is None and node.target in _POOL_FUNCTIONS):
        if _option(node, module, "return_indices", False):
            return None
        # A maximum pads with -inf; an average may count zeros that it padded with.
        average = (module is None and node.target is F.avg_pool2d) or type(module) is nn.AvgPool2d
        if not average or _averages_what_is_there(node, module):
            return Mapped(constant)
        return Mapped(constant.masked_fill(constant != 0, float("nan")))
    # Interpolation takes weights that add up to 1, whatever its mode.
    if type(module) in _RESIZES or (module is None and node.target is F.interpolate):
        return Mapped(constant)
    return None


def _is_identity(node: fx.Node, module: nn.Module | None) -> bool:
    if module is not None:
        return type(module) in _IDENTITIES
    if _name(node) == "stochastic_depth":  # torchvision's, known by name: not imported for this
        return len(node.args) == 4 and node.args[3] is False
    return node.target in (F.dropout, F.dropout2d) and node.kwargs.get("training") is False


def _activated(node: fx.Node, module: nn.Module | None, constant: Tensor) -> Mapped | None:
    if len(node.args) != 1 or any(isinstance(value, fx.Node) for value in node.kwargs.values()):
        return None
    function: Any = module
    if module is None:
        method = isinstance(node.target, str)
        function = getattr(Tensor, str(node.target)) if method else node.target
    in_place = bool(_option(node, module, "inplace", False)) or _name(node).endswith("_")
    value = function(constant.clone(), **node.kwargs)
    return Mapped(value.masked_fill(constant.isnan(), float("nan")), in_place)


def _averages_what_is_there(node: fx.Node, module: nn.Module | None) -> bool:
    padding = _option(node, module, "padding", 0)
    if module is None and len(node.args) > 3:
        return False  # options by position
    if _option(node, module, "divisor_override", None):
        return False
    return padding in (0, (0, 0), [0, 0]) or not _option(node, module, "count_include_pad", True)


def _option(node: fx.Node, module: nn.Module | None, name: str, default: Any) -> Any:
    return node.kwargs.get(name, default) if module is None else getattr(module, name, default)


def _name(node: fx.Node) -> str:
    return "" if node.op == "call_module" else getattr(node.target, "__name__", str(node.target))


def is_binary(node: fx.Node) -> bool:
    """Return whether a node adds or multiplies two values, one of which may be a number."""
    known = node.target in _ADDS or node.target in _PRODUCTS
    fits = known and len(node.args) == 2 and not node.kwargs
    return fits and isinstance(node.args[1], fx.Node | float | int)


def combine(node: fx.Node, a: Tensor, b: Tensor | float) -> tuple[Tensor, bool]:
    """Return the sum or product of constants, and whether it is written where `a` was."""
    in_place = node.target in _IN_PLACE or _name(node).endswith("_")
    if node.target in _ADDS:
        return a + b, in_place
    other = b if isinstance(b, Tensor) else torch.full_like(a, b)
    return (a * other).masked_fill((a == 0) | (other == 0), 0), in_place


def may_be_in_place(node: fx.Node) -> bool:
    """Return whether a sum or product may be written where it was read: `a += b` is traced as
    `a + b`."""
    return node.target in (operator.add, operator.mul)


def is_concatenation(node: fx.Node) -> bool:
    """Return whether a node puts channels side by side."""
    if node.target not in (torch.cat, torch.concat) or not isinstance(node.args[0], list | tuple):
        return False
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return dim == 1


def flattened(node: fx.Node, layout: str) -> str | None:
    """Return the layout after (N, C, ...) -> (N, -1); None where a node does something else."""
    rest: tuple[Any, ...] = node.args[1:]
    if node.target in (torch.flatten, "flatten"):
        fits = (rest == (1,) and not node.kwargs) or (
            not rest and dict(node.kwargs) == {"start_dim": 1}
        )
    elif node.target in (torch.reshape, "reshape", "view") and not node.kwargs:
        shape = rest[0] if len(rest) == 1 and isinstance(rest[0], list | tuple) else rest
        fits = len(shape) == 2 and shape[1] == -1 and _is_batch_size(shape[0])
    else:
        fits = False
    return ("flat" if layout == "map" else layout) if fits else None


def _is_batch_size(value: Any) -> bool:
    if not isinstance(value, fx.Node):
        return False
    if value.target is operator.getitem and isinstance(value.args[0], fx.Node):
        index: Any = value.args[1]
        return bool(index == 0) and _is_shape(value.args[0])
    return value.target == "size" and value.args[1:] == (0,)


def _is_shape(node: fx.Node) -> bool:
    if node.target is getattr:
        return bool(node.args[1] == "shape")
    return node.target == "size" and len(node.args) == 1 and not node.kwargs


def averaged(node: fx.Node, layout: str) -> str | None:
    """Return the layout after a mean over height and width; None for anything else."""
    if node.target not in (torch.mean, "mean") or layout != "map":
        return None
    options = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | node.kwargs
    dims = options.pop("dim", None)
    keepdim = options.pop("keepdim", False)
    if options or not isinstance(dims, list | tuple) or not isinstance(keepdim, bool):
        return None
    if not all(isinstance(d, int) for d in dims) or sorted(d % 4 for d in dims) != [2, 3]:
        return None
    return "map" if keepdim else "vector"


def reads_size_only(node: fx.Node, layout: str) -> bool:
    """Return whether a node reads of a tensor only what stays when channels are removed."""
    dims = list(range(4 if layout == "map" else 2))
    if node.target == "dim" or (node.target is getattr and node.args[1] in ("dtype", "device")):
        return True
    if node.target == "size" and len(node.args) == 2 and isinstance(node.args[1], int):
        return dims[node.args[1]] != 1
    return _is_shape(node) and all(
        user.target is operator.getitem and _selects_no_channels(dims, user.args[1])
        for user in node.users
    )


def _selects_no_channels(dims: list[int], index: Any) -> bool:
    if isinstance(index, int):
        return dims[index] != 1
    parts = (index.start, index.stop, index.step) if isinstance(index, slice) else (index,)
    return all(part is None or isinstance(part, int) for part in parts) and 1 not in dims[index]
