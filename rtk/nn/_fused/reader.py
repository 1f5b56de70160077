"""What a network consists of: a stem, fused steps and a tail, read from its torch.fx trace.

The grammar, in which `value` is a post-ReLU activation with a number:

    image:  x | (x - mean) / std | torchvision's Normalize
    stem:   image -> convolution -> batch norm -> ReLU [-> max-pool 3x3, stride 2, padding 1]
    step:   value -> convolution -> batch norm [+ value | + step without ReLU] -> ReLU
    tail:   all that follows the last ReLU; it has no convolution
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rtk.nn._fused.layers import Layer, NotApplicable, why_not_convolution, why_not_norm
from rtk.nn._fused.structure import Scale, Step, Structure
from rtk.nn._fused.trace import trace
from rtk.nn._trace import describe
from rtk.nn.batch_norm_act import BatchNormAct2d

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_TRANSPARENT = (nn.Identity, nn.Dropout, nn.Dropout2d)  # in eval mode
_RELUS: tuple[Any, ...] = (torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_")
_ADDS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
_SUBTRACTIONS: tuple[Any, ...] = (operator.sub, torch.sub, "sub")
_DIVISIONS: tuple[Any, ...] = (operator.truediv, torch.div, torch.true_divide, "div")
_IN_PLACE: tuple[Any, ...] = (operator.iadd, "add_")  # of the sums


@dataclass(frozen=True)
class _Image:
    mean: Scale | None = None
    std: Scale | None = None


@dataclass(frozen=True)
class _Value:
    number: int


@dataclass(frozen=True)
class _Convolved:
    conv: nn.Conv2d
    name: str
    source: _Image | _Value


@dataclass(frozen=True)
class _Normed:
    layer: Layer
    source: _Image | _Value


@dataclass(frozen=True)
class _Added:
    main: _Normed
    other: _Normed | _Value


_Symbol = _Image | _Value | _Convolved | _Normed | _Added


def recognise(model: nn.Module) -> Structure:
    """Return the structure of a network in eval mode.

    Raises:
        NotApplicable: if it is something else, saying what and where.
    """
    with trace(model) as traced:
        return _Reader(traced).read()


class _Reader:
    """Reads a trace node by node; `symbols` holds what was understood so far."""

    def __init__(self, traced: fx.GraphModule) -> None:
        self._modules = dict(traced.named_modules(remove_duplicate=False))
        self._traced = traced
        self._structure = Structure()
        self._symbols: dict[fx.Node, _Symbol] = {}
        self._constants: dict[fx.Node, Tensor] = {}
        self._rest: list[fx.Node] = []

    def read(self) -> Structure:
        inputs = [n for n in self._traced.graph.nodes if n.op == "placeholder"]
        if len(inputs) != 1:
            raise NotApplicable(f"its forward takes {len(inputs)} arguments, not images alone")
        for node in self._traced.graph.nodes:
            if node.op == "placeholder":
                self._symbols[node] = _Image()
            elif node.op == "get_attr":
                self._constants[node] = operator.attrgetter(node.target)(self._traced)
            elif (symbol := self._understand(node)) is not None:
                self._symbols[node] = symbol
            else:
                self._leave(node)
        self._make_tail()
        if not all(self._structure.consumers()):
            raise NotApplicable("a layer's output is not used")
        return self._structure

    def _leave(self, node: fx.Node) -> None:
        """Leave a node that was not understood to the tail, or say why that cannot be."""
        if node.op == "call_module" and isinstance(self._modules[node.target], nn.Conv2d):
            raise NotApplicable(f"{describe(node)} reads what is not the output of a ReLU")
        for source in node.all_input_nodes:
            if not isinstance(self._symbols.get(source, _Value(0)), _Value):
                raise NotApplicable(
                    f"{describe(node)} after {describe(source)} does not fit convolution -> "
                    "batch norm [+ activation] -> ReLU"
                )
        self._rest.append(node)

    def _make_tail(self) -> None:
        values = {
            symbol.number
            for node in self._rest
            for source in node.all_input_nodes
            if isinstance(symbol := self._symbols.get(source), _Value)
        }
        if len(values) != 1:
            raise NotApplicable(f"what follows reads {len(values)} activations, not the last alone")
        graph = fx.Graph()
        activation = graph.placeholder("activation")
        copies: dict[fx.Node, fx.Node] = {}

        def copied(node: fx.Node) -> fx.Node:
            if node in self._symbols:
                return activation
            if node in self._constants and node not in copies:
                copies[node] = graph.node_copy(node)
            return copies[node]

        for node in self._rest:
            for source in node.all_input_nodes:
                copied(source)  # constants come before what reads them
            copies[node] = graph.node_copy(node, copied)
        self._structure.last = values.pop()
        self._structure.tail = fx.GraphModule(self._traced, graph).eval()

    def _understand(self, node: fx.Node) -> _Symbol | None:
        if node.op not in ("call_module", "call_function", "call_method") or not node.args:
            return None
        symbol = self._symbol_of(node.args[0])
        module = self._modules[str(node.target)] if node.op == "call_module" else None
        function = node.target if module is None else None  # a module may be called "relu"
        if isinstance(module, _TRANSPARENT):
            return symbol
        if isinstance(module, nn.Conv2d):
            return self._convolved(node, module, symbol)
        if isinstance(module, BatchNormAct2d):
            return self._normed_and_activated(node, module, symbol)
        if isinstance(module, _NORMS):
            return self._normed(node, module, symbol)
        if isinstance(module, nn.MaxPool2d):
            return self._pooled(node, module, symbol)
        if isinstance(module, nn.ReLU) or function in _RELUS:
            return self._activated(node, symbol)
        if type(module).__name__ == "Normalize" and symbol == _Image():
            return _Image(tuple(module.mean), tuple(module.std))  # type: ignore[union-attr, arg-type]
        if function is not None and len(node.args) == 2 and not node.kwargs:
            if isinstance(symbol, _Image):
                return self._scaled(node, symbol, node.args[1])
            if function in _ADDS:
                return self._added(node, symbol, self._symbol_of(node.args[1]))
        return None

    def _symbol_of(self, argument: Any) -> _Symbol | None:
        return self._symbols.get(argument) if isinstance(argument, fx.Node) else None

    def _scaled(self, node: fx.Node, image: _Image, by: Any) -> _Image | None:
        scale = self._constants.get(by) if isinstance(by, fx.Node) else by
        if not isinstance(scale, Tensor | float | int) or not _per_channel(scale):
            return None
        if node.target in _SUBTRACTIONS and image == _Image():
            return _Image(scale, None)
        if node.target in _DIVISIONS and image.std is None:
            return _Image(image.mean, scale)
        return None

    def _convolved(
        self, node: fx.Node, conv: nn.Conv2d, source: _Symbol | None
    ) -> _Convolved | None:
        if not isinstance(source, _Image | _Value):
            return None
        name = str(node.target)
        if reason := why_not_convolution(conv, stem=isinstance(source, _Image)):
            raise NotApplicable(f"{describe(node)}: {reason}")
        return _Convolved(conv, name, source)

    def _normed(self, node: fx.Node, norm: Any, source: _Symbol | None) -> _Normed | None:
        if not isinstance(source, _Convolved) or not self._read_once(node):
            return None
        if reason := why_not_norm(norm):
            raise NotApplicable(f"{describe(node)}: {reason}")
        return _Normed(Layer(source.name, source.conv, norm), source.source)

    def _normed_and_activated(
        self, node: fx.Node, norm: BatchNormAct2d, source: _Symbol | None
    ) -> _Symbol | None:
        """Read BatchNormAct2d's (x, residual=None, relu=False) as the nodes that it stands for."""
        arguments = dict(zip(("residual", "relu"), node.args[1:], strict=False)) | node.kwargs
        symbol: _Symbol | None = self._normed(node, norm, source)
        if arguments.get("residual") is not None:
            symbol = self._added(node, symbol, self._symbol_of(arguments["residual"]))
        return self._activated(node, symbol) if arguments.get("relu", False) else symbol

    def _added(self, node: fx.Node, a: _Symbol | None, b: _Symbol | None) -> _Added | None:
        # The deeper convolution takes the other as its residual: its own input comes later.
        if isinstance(a, _Normed) and isinstance(b, _Normed):
            a, b = (a, b) if _depth(a) >= _depth(b) else (b, a)
        elif isinstance(b, _Normed):
            if node.target in _IN_PLACE:  # would change an activation that others may read
                return None
            a, b = b, a
        if not isinstance(a, _Normed) or not isinstance(b, _Normed | _Value):
            return None
        if isinstance(a.source, _Image) or (isinstance(b, _Normed) and _depth(b) < 0):
            return None
        return _Added(a, b) if self._read_once(node) else None

    def _read_once(self, node: fx.Node) -> bool:
        """Return whether nobody else reads the convolutions and sums that `node` reads."""
        return all(
            len(source.users) == 1
            for source in node.all_input_nodes
            if not isinstance(self._symbols.get(source), _Value | _Image)
        )

    def _activated(self, node: fx.Node, symbol: _Symbol | None) -> _Value | None:
        if not isinstance(symbol, _Normed | _Added) or not self._read_once(node):
            return None
        if isinstance(symbol, _Added):
            other = symbol.other
            residual = other.number if isinstance(other, _Value) else self._emit(other, None, False)
            return _Value(self._emit(symbol.main, residual, True))
        if isinstance(symbol.source, _Value):
            return _Value(self._emit(symbol, None, True))
        if self._structure.layers:
            raise NotApplicable(f"{symbol.layer.name} is a second convolution of the images")
        self._structure.layers.append(symbol.layer)
        self._structure.mean, self._structure.std = symbol.source.mean, symbol.source.std
        return _Value(0)

    def _emit(self, normed: _Normed, residual: int | None, relu: bool) -> int:
        assert isinstance(normed.source, _Value)
        number = len(self._structure.layers)
        self._structure.layers.append(normed.layer)
        self._structure.steps.append(Step(number, normed.source.number, residual, relu))
        return number

    def _pooled(self, node: fx.Node, pool: nn.MaxPool2d, symbol: _Symbol | None) -> _Value | None:
        fits = (
            all(
                _is_pair(got, want)
                for got, want in zip(_pool_sizes(pool), (3, 2, 1, 1), strict=True)
            )
            and not pool.ceil_mode
            and not pool.return_indices
        )
        if symbol != _Value(0) or self._structure.pool or not fits:
            return None
        unpooled = [known for known, what in self._symbols.items() if what == symbol]
        if any(user is not node and user not in unpooled for n in unpooled for user in n.users):
            return None
        self._structure.pool = True
        return _Value(0)


def _depth(normed: _Normed) -> int:
    return normed.source.number if isinstance(normed.source, _Value) else -1


def _pool_sizes(pool: nn.MaxPool2d) -> tuple[Any, ...]:
    return pool.kernel_size, pool.stride, pool.padding, pool.dilation


def _is_pair(size: int | tuple[int, ...], wanted: int) -> bool:
    return size == wanted or size == (wanted, wanted)


def _per_channel(scale: Tensor | float) -> bool:
    if not isinstance(scale, Tensor):
        return True
    if scale.numel() == 1:
        return scale.dim() <= 4
    return scale.shape in ((3, 1, 1), (1, 3, 1, 1))
