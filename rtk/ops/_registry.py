"""How an op is declared once and reaches one of its backends.

An `Op` is a `torch.library` operator in the namespace rtk. Its `check` runs in eager *and* in
the fake, so that a shape that is wrong never broadcasts silently in one of them. Which backend
runs is decided here and nowhere else: the first implementation, in the order of registration,
that serves the arguments; or the one that the user forced, which raises if it cannot serve.

Where no gradient is wanted and nobody looks (`unwatched`) a call goes past torch's dispatcher:
every stop there is a way into Python and out again, some 30 us each.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils import _pytree

from rtk.errors import RtkError, check_choice

BACKENDS = ("reference", "cpu", "triton", "cuda")

library = torch.library.Library("rtk", "FRAGMENT")
ops: dict[str, Op] = {}

_forced: str | None = os.environ.get("RTK_BACKEND") or None


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Force a backend for every op inside the `with`, in the whole process (backward included).

    Args:
        name: "reference", "cpu", "triton" or "cuda"; None lets each op choose again.

    Raises:
        RtkError: for an unknown name here; for an op that the backend cannot serve, where the op
            is called (a forced backend never falls back).
    """
    global _forced
    if name is not None:
        check_choice("backend", name, BACKENDS)
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def is_forced() -> bool:
    """Whether a backend is forced."""
    return _forced is not None


@dataclass(frozen=True)
class Implementation:
    """One backend of one op; `serves` gives the reason why it cannot take some arguments."""

    backend: str
    run: Callable[..., Any]
    serves: Callable[..., str | None]


class Op:
    """A `torch.library` operator: its schema, its check, its fake and its backends."""

    def __init__(self, schema: str, check: Callable[..., None], fake: Callable[..., Any]) -> None:
        self.name = schema.split("(")[0]
        self.check = check
        self.implementations: list[Implementation] = []
        self._autocasts = False
        library.define(schema)
        library.impl(self.name, self._run, "CompositeExplicitAutograd")
        self.overload = getattr(torch.ops.rtk, self.name).default

        def checked_fake(*args: Any, **kwargs: Any) -> Any:
            check(*args, **kwargs)
            return fake(*args, **kwargs)

        torch.library.register_fake(f"rtk::{self.name}", checked_fake, lib=library)
        torch.library.register_vmap(f"rtk::{self.name}", self._vmap_by_loop, lib=library)
        ops[self.name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() and not self._autocasts and unwatched(*args):
            return self._run(*args, **kwargs)
        return self.overload(*args, **kwargs)

    def implementation(
        self, backend: str, serves: Callable[..., str | None] = lambda *a, **k: None
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorate the function that runs this op on `backend`; register the preferred first."""

        assert all(i.backend != "reference" for i in self.implementations), "it comes last"

        def add(run: Callable[..., Any]) -> Callable[..., Any]:
            self.implementations.append(Implementation(backend, run, serves))
            return run

        return add

    def choose(self, *args: Any, **kwargs: Any) -> Implementation:
        """Return the implementation that these arguments would take, or raise an RtkError."""
        if _forced is None:
            for candidate in self.implementations:
                if candidate.serves(*args, **kwargs) is None:
                    return candidate
            raise AssertionError(f"{self.name}: the reference must serve everything")
        check_choice("backend (RTK_BACKEND)", _forced, BACKENDS)
        for candidate in self.implementations:
            if candidate.backend == _forced:
                reason = candidate.serves(*args, **kwargs)
                if reason is None:
                    return candidate
                raise RtkError(f"{self.name}: the forced backend {_forced!r} cannot: {reason}")
        known = ", ".join(i.backend for i in self.implementations)
        raise RtkError(f"{self.name}: there is no backend {_forced!r}, only {known}")

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        self.check(*args, **kwargs)
        return self.choose(*args, **kwargs).run(*args, **kwargs)

    def autograd(self, function: type[torch.autograd.Function]) -> None:
        """Differentiate the op through `function`, whose forward calls `below_autograd`."""
        # Inside torch.func the dispatcher has come to one of its levels when it calls the kernel.
        # Function.apply would walk through the levels itself; its base class stays on this one.
        on_one_level: Any = type(
            function.__name__,
            (_SingleLevelFunction,),
            {
                "forward": staticmethod(function.forward),
                "backward": staticmethod(function.backward),
            },
        )

        def kernel(*args: Any) -> Any:
            if forward_ad._current_level >= 0:  # tangents would be dropped without a word
                raise RtkError(f"{self.name}: there is no forward-mode derivative; use backward")
            if not torch.is_grad_enabled() or not any(
                isinstance(a, Tensor) and a.requires_grad for a in args
            ):
                return self.below_autograd(*args)
            if torch._C._are_functorch_transforms_active():
                with enable_single_level_autograd_function():
                    return on_one_level.apply(*args)
            return function.apply(*args)

        library.impl(self.name, kernel, "Autograd")

    def no_gradient(self) -> None:
        """Give results that do not require grad, whatever the arguments do."""
        library.impl(self.name, self.below_autograd, "Autograd")

    def below_autograd(self, *args: Any, **kwargs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*args, **kwargs)

    def autocast_first_argument(self) -> None:
        """Under autocast, cast the first argument (the activations) and nothing else.

        Weights stay the fp32 masters: they are cast while they are masked, in one pass, and
        their gradient is returned in fp32 without a copy in between.
        """
        self._autocasts = True
        for device in ("cpu", "cuda"):
            key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")

            def kernel(x: Tensor, *args: Any, device: str = device, key: Any = key) -> Any:
                if x.is_floating_point() and x.dtype != torch.float64:
                    x = x.to(torch.get_autocast_dtype(device))
                with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                    return self.overload(x, *args)

            library.impl(self.name, kernel, f"Autocast{device.upper()}")

    def _vmap_by_loop(self, info: Any, in_dims: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the op once a slice: right for every op; the kernels batch over N themselves."""
        leaves, spec = _pytree.tree_flatten(args)
        dims = _pytree.tree_flatten(in_dims, is_leaf=lambda d: d is None)[0]
        results = []
        for i in range(info.batch_size):
            picked = [
                leaf if dim is None else leaf.select(dim, i)
                for leaf, dim in zip(leaves, dims, strict=True)
            ]
            results.append(self.overload(*_pytree.tree_unflatten(picked, spec), **kwargs))
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return [torch.stack(r) for r in zip(*results, strict=True)], [0] * len(results[0])


_SIMPLE = {type(None), bool, int, float, str, torch.dtype, torch.Size}


def unwatched(*args: Any) -> bool:
    """Whether a call on these arguments may run at once, without its operator being seen.

    That is eager mode, on tensors that are no more than memory, with nothing that compiles, traces,
    transforms or profiles.
    """
    return (
        not torch.compiler.is_compiling()  # first: what follows cannot be traced
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and not torch._C._are_functorch_transforms_active()
        and not torch.autograd._profiler_enabled()
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
        and all(map(_is_plain, args))
    )


def _is_plain(argument: Any) -> bool:
    kind = type(argument)
    if kind is Tensor or kind is nn.Parameter:
        return (argument.is_cuda or argument.is_cpu) and not argument.is_neg()
    if kind is list or kind is tuple:
        return all(map(_is_plain, argument))
    return kind in _SIMPLE


def require(condition: bool, message: str, *values: object) -> None:
    """Raise an RtkError with `message % values` unless `condition` holds."""
    if not condition:
        raise RtkError(message % values)
