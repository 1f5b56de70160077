"""Reads a trace: which slots and constants every activation has, and what was not understood."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx, nn

from rtk.nn import _elementwise as elementwise
from rtk.nn._channels import NAN, Channels, Content, Mixing, PerChannel, Reading, vector
from rtk.nn._trace import describe
from rtk.nn.batch_norm_act import BatchNormAct2d

_NORMS = {
    nn.BatchNorm2d: ("map",),
    nn.SyncBatchNorm: ("map",),
    nn.BatchNorm1d: ("flat", "vector"),
}


def read(traced: fx.GraphModule) -> Reading:
    """Return the channels of a network in eval mode, without masked layers."""
    return _Reader(traced).read()


class _Reader:
    """Reads a trace node by node, in the order in which it runs."""

    def __init__(self, traced: fx.GraphModule) -> None:
        self._graph = traced.graph
        self._modules = dict(traced.named_modules(remove_duplicate=False))
        self._frozen = _frozen(traced, self._modules)
        self._values: dict[fx.Node, Channels] = {}
        self._writers: dict[fx.Node, Mixing] = {}
        self._reading = Reading()

    def read(self) -> Reading:
        for node in self._graph.nodes:
            value = self._understand(node)
            if value is None:
                self._leave(node)
            else:
                self._values[node] = value
                self._reading.values.append(value.slots)
        return self._reading

    def _leave(self, node: fx.Node) -> None:
        """Keep all that a node reads which was not understood; it may even write there."""
        for source in node.all_input_nodes:
            value = self._values.get(source)
            if value is None or elementwise.reads_size_only(node, value.layout):
                continue
            self._reading.pinned.append(value.slots)
            value.content.constant = torch.full_like(value.constant, NAN)
            if node.op == "call_module":
                module = self._modules[str(node.target)]
                self._reading.left[str(node.target)] = self._why_left(module)
            elif node.op != "output":
                self._reading.left[node.name] = f"{describe(node)} is not understood"

    def _why_left(self, module: nn.Module) -> str:
        if module in self._frozen:
            return "it is called or its parameters are used elsewhere, too"
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            return f"it has {module.groups} groups"
        return f"{type(module).__name__} is not understood"

    def _understand(self, node: fx.Node) -> Channels | None:
        if node.op == "call_module":
            return self._module(node, self._modules[str(node.target)])
        if node.op not in ("call_function", "call_method") or not node.args:
            return None
        if elementwise.is_concatenation(node):
            return self._concatenated(node.args[0])
        source = self._value_of(node.args[0])
        if source is None:
            return None
        if elementwise.is_binary(node):
            return self._combined(node, source, node.args[1])
        if (layout := elementwise.flattened(node, source.layout)) is not None:
            return Channels(source.slots, source.content, layout)  # a view of the same memory
        if (layout := elementwise.averaged(node, source.layout)) is not None:
            return Channels(source.slots, Content(source.constant), layout)
        return self._mapped(node, None, source)

    def _module(self, node: fx.Node, module: nn.Module) -> Channels | None:
        if module in self._frozen or not node.args:
            return None
        source = self._value_of(node.args[0])
        if isinstance(module, BatchNormAct2d):
            return self._normed_and_activated(node, module, source)
        if len(node.args) != 1 or node.kwargs:
            return None
        if type(module) is nn.Conv2d and module.groups == 1:
            return self._mixed(node, module, source)
        if source is None:
            return None
        if type(module) is nn.Linear:
            return self._mixed(node, module, source)
        if type(module) is nn.Conv2d:
            return self._depthwise(node, module, source)
        if type(module) in _NORMS:
            return self._normed(node, module, source)
        if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            layout = "flat" if source.layout == "map" else source.layout
            return Channels(source.slots, source.content, layout)
        return self._mapped(node, module, source)

    def _value_of(self, argument: Any) -> Channels | None:
        return self._values.get(argument) if isinstance(argument, fx.Node) else None

    def _mapped(self, node: fx.Node, module: nn.Module | None, source: Channels) -> Channels | None:
        mapped = elementwise.apply(node, module, source.constant, source.layout)
        if mapped is None:
            return None
        if mapped.in_place:
            source.content.constant = mapped.constant
            return source
        return source.with_constant(mapped.constant)

    def _mixed(
        self, node: fx.Node, module: nn.Conv2d | nn.Linear, source: Channels | None
    ) -> Channels | None:
        weight = module.weight.detach().cpu()
        convolution = isinstance(module, nn.Conv2d)
        if source is not None:
            source = source if convolution else source.expanded(weight.shape[1])
            wanted = "map" if convolution else "vector"
            if source.layout != wanted or len(source.slots) != weight.shape[1]:
                return None
        filters = weight.flatten(2) if convolution else weight[..., None]
        layer = Mixing(
            module=module,
            source=None if source is None else source.slots,
            constant=filters.new_full((weight.shape[1],), NAN, dtype=torch.float64)
            if source is None
            else source.constant,
            out=self._reading.new(weight.shape[0]),
            reads=(filters != 0).any(2),
            taps=filters.double().sum(2) if convolution else weight,
            borders=_pads_with_zeros(module),
        )
        self._reading.mixing.append(layer)
        self._writers[node] = layer
        return Channels(layer.out, Content(layer.outputs()), "map" if convolution else "vector")

    def _depthwise(self, node: fx.Node, conv: nn.Conv2d, source: Channels) -> Channels | None:
        channels = len(source.slots)
        if source.layout != "map" or not conv.groups == conv.out_channels == channels:
            return None
        self._reading.per_channel.append(PerChannel(conv, source.slots))
        filters = conv.weight.detach().cpu().flatten(1)
        reads = (filters != 0).any(1)
        bias = vector(conv.bias, channels, 0)
        constant = torch.where(reads, bias + filters.double().sum(1) * source.constant, bias)
        if _pads_with_zeros(conv):
            constant = constant.masked_fill(reads & (source.constant != 0), NAN)
        return source.with_constant(constant)

    def _normed(self, node: fx.Node, norm: Any, source: Channels | None) -> Channels | None:
        if source is None:
            return None
        source = source.expanded(norm.num_features)
        fits = source.layout in _NORMS.get(type(norm), ("map",))
        if not fits or len(source.slots) != norm.num_features:
            return None
        self._reading.per_channel.append(PerChannel(norm, source.slots))
        if norm.running_mean is None:
            return source.with_constant(torch.full_like(source.constant, NAN))
        before = node.all_input_nodes[0]
        others = (*node.args[1:], *node.kwargs.values())
        if before in self._writers and len(before.users) == 1 and before not in others:
            self._writers[before].norm = norm
        channels = norm.num_features
        gamma = vector(norm.weight, channels, 1)
        beta = vector(norm.bias, channels, 0)
        mean, var = vector(norm.running_mean, channels, 0), vector(norm.running_var, channels, 1)
        constant = (source.constant - mean) / (var + norm.eps).sqrt() * gamma + beta
        constant = torch.where(gamma == 0, beta, constant)
        return source.with_constant(constant.masked_fill(constant.isinf(), NAN))

    def _normed_and_activated(
        self, node: fx.Node, norm: BatchNormAct2d, source: Channels | None
    ) -> Channels | None:
        """Read BatchNormAct2d's (x, residual=None, relu=False) as what it stands for."""
        arguments = dict(zip(("residual", "relu"), node.args[1:], strict=False)) | node.kwargs
        residual, relu = arguments.get("residual"), arguments.get("relu", False)
        other = self._value_of(residual)
        if residual is not None and (source is None or not _alike(source, other)):
            return None
        value = self._normed(node, norm, source)
        if value is None or not isinstance(relu, bool):
            return None
        if other is not None:
            self._reading.unite(value.slots, other.slots)
            value = value.with_constant(value.constant + other.constant)
        return value.with_constant(value.constant.clamp(min=0)) if relu else value

    def _combined(self, node: fx.Node, a: Channels, argument: Any) -> Channels | None:
        other = self._value_of(argument)
        if isinstance(argument, fx.Node):
            if other is None or not _alike(a, other):
                return None
            self._reading.unite(a.slots, other.slots)
        if elementwise.may_be_in_place(node) and self._is_read_after(node, a.content):
            a.content.constant = torch.full_like(a.constant, NAN)
            return a.with_constant(a.constant)
        by = argument if other is None else other.constant
        constant, in_place = elementwise.combine(node, a.constant, by)
        if in_place:
            a.content.constant = constant
            return a
        return a.with_constant(constant)

    def _is_read_after(self, node: fx.Node, content: Content) -> bool:
        nodes = [n for n, value in self._values.items() if value.content is content]
        return any(user > node for n in nodes for user in n.users)

    def _concatenated(self, parts: Any) -> Channels | None:
        values = [self._value_of(part) for part in parts]
        known = [value for value in values if value is not None]
        if len(known) < len(values) or {v.layout for v in known} not in ({"map"}, {"vector"}):
            return None
        constant = torch.cat([value.constant for value in known])
        return Channels(
            torch.cat([value.slots for value in known]), Content(constant), known[0].layout
        )


def _alike(a: Channels, b: Channels | None) -> bool:
    return b is not None and a.layout == b.layout and len(a.slots) == len(b.slots)


def _pads_with_zeros(module: nn.Module) -> bool:
    if not isinstance(module, nn.Conv2d):
        return False
    return module.padding_mode == "zeros" and any(module._reversed_padding_repeated_twice)


def _frozen(traced: fx.GraphModule, modules: dict[str, nn.Module]) -> set[nn.Module]:
    """Return the modules whose parameters must keep their shapes: others use them as well."""
    calls: Counter[nn.Module] = Counter()
    owners: Counter[int] = Counter()
    frozen: set[nn.Module] = set()
    for node in traced.graph.nodes:
        if node.op == "call_module":
            calls[modules[str(node.target)]] += 1
        elif node.op == "get_attr":
            frozen.add(modules[str(node.target).rpartition(".")[0]])
    for module in traced.modules():
        owners.update(id(p) for p in module._parameters.values() if p is not None)
    for module in traced.modules():
        shared = any(owners[id(p)] > 1 for p in module._parameters.values())
        if "forward" in vars(module) or (shared and calls[module]):
            frozen.add(module)
    return frozen | {module for module, count in calls.items() if count > 1 and _has_state(module)}


def _has_state(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())
