"""The torch.fx trace of a network, which leaves the network as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import fx, nn

from rtk.nn._masked import MaskedLayer
from rtk.nn.batch_norm_act import BatchNormAct2d
from rtk.nn.max_pool2d import MaxPool2d


class NotTraceable(Exception):
    """Why a network has no trace, in a few words."""


def describe(node: fx.Node) -> str:
    """Return a node's name for a reader: a module's path, or a function's name."""
    if node.op == "output":
        return "the result"
    if node.op == "placeholder":
        return "the images"
    return getattr(node.target, "__name__", str(node.target))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, MaskedLayer | BatchNormAct2d | MaxPool2d):
            return True
        # torchvision's looks at its argument's type, which a trace cannot.
        transform = type(m).__module__.startswith("torchvision.transforms")
        return (transform and type(m).__name__ == "Normalize") or super().is_leaf_module(
            m, module_qualified_name
        )


@contextlib.contextmanager
def trace(model: nn.Module) -> Iterator[fx.GraphModule]:
    """Trace a network in eval mode; the graph's modules are the network's own.

    Raises:
        NotTraceable: if it is not in eval mode, has hooks, or cannot be traced.
    """
    reason = _why_not(model)
    if reason is not None:
        raise NotTraceable(reason)
    attributes = set(vars(model))
    try:
        try:
            traced = _traced(model)
        except Exception as error:  # whatever the forward does with what is not a tensor
            lines = str(error).strip().splitlines()
            raise NotTraceable(
                f"torch.fx cannot trace it: {lines[0] if lines else type(error).__name__}"
            ) from error
        yield traced
    finally:
        for name in set(vars(model)) - attributes:  # fx notes constants on what it traces
            delattr(model, name)


def _traced(model: nn.Module) -> fx.GraphModule:
    tracer = _Tracer()
    graph = tracer.trace(model)
    return fx.GraphModule(tracer.root, graph)


def _why_not(model: nn.Module) -> str | None:
    for name, module in model.named_modules():
        if module.training:
            return f"{name or 'the model'} is in training mode"
        if has_hooks(module):
            return f"{name or 'the model'} has hooks, which it would not call"
    return None


Hook = TypeVar("Hook", bound=Callable[..., Any])
_harmless: set[Any] = set()


def harmless(hook: Hook) -> Hook:
    """Decorate a hook of rtk's own that changes no value: a trace can do without it."""
    _harmless.add(hook)
    return hook


def has_hooks(module: Any) -> bool:
    """Return whether code of others runs with a module's forward or backward."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hook not in _harmless for each in hooks for hook in each.values())
