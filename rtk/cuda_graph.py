"""Work that is captured once in a CUDA graph and replayed: training steps and attacks.

A replay launches every kernel of the work at once, without Python, so what it does must depend on
nothing but the memory it was captured with. `Graphed` finds that out, and runs eagerly elsewhere.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import gc
import random
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from rtk.errors import RtkError

GraphChoice = Literal["auto"] | bool

WARM_UP = 3  # eager calls before a capture: libraries load, caches fill, optimiser state appears
_MOST_CAPTURES = 8  # a model that is changed again and again is not worth capturing again and again
_SYNCHRONISES = "called a synchronizing CUDA operation"  # torch's own words


class CannotCapture(Exception):
    """Why some work cannot be captured, in a few words."""


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    result: Tensor
    signature: tuple[object, ...]
    state: list[object]


class Graphed(abc.ABC):
    """A function of tensors on a GPU that runs eagerly a few times and from then on by replay.

    The first `WARM_UP` calls with one signature (shapes, dtypes and strides of the inputs) are
    eager ones on a side stream; the next is captured, and every later one of that signature is a
    replay. Other signatures, such as an epoch's last, smaller batch, run eagerly: one graph is
    kept, in one memory pool of its own. Where `state()` has changed (a module's mode, a weight's
    memory) calls are eager again, and if it stays so a new graph takes the old one's place.

    Python code of the work (counters, hooks, prints) runs at the capture and not in a replay; so
    do choices that are not part of `state()`, as of a backend.

    Args:
        what: the function's public name, for messages.
        graph: "auto" falls back to eager for good, with one warning that says why, where the work
            cannot be captured; True raises an RtkError there; False never captures.
        why_not: a reason known beforehand against capturing.
    """

    def __init__(self, what: str, graph: GraphChoice, why_not: str | None = None) -> None:
        if not isinstance(graph, bool) and graph != "auto":
            raise RtkError(f"{what}: graph must be 'auto', True or False, got {graph!r}")
        self._what = what
        self._graph = graph
        self._captured: _Captured | None = None
        self._captures = 0
        self._seen: dict[tuple[object, ...], int] = {}
        self._state: list[object] = []
        if why_not is not None and graph is not False:
            self._give_up(why_not)

    @abc.abstractmethod
    def eager(self, *inputs: Tensor) -> Tensor:
        """Do the work."""

    @abc.abstractmethod
    def recorded(self, *inputs: Tensor) -> Tensor:
        """Do the work reading what changes from call to call (seeds, rates) from the device."""

    @abc.abstractmethod
    def state(self) -> list[object]:
        """Return what a graph stays valid for, to be compared at every call: quickly."""

    @abc.abstractmethod
    def refresh(self) -> None:
        """Bring what `recorded` reads from the device up to date, before a replay."""

    def rehearse(self, *inputs: Tensor) -> Tensor:
        """Do the work as `eager` does, but waiting for the GPU only where `recorded` would."""
        return self.eager(*inputs)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Prepare for `recorded`; undo what it did to Python objects if an exception comes."""
        yield

    @property
    def captured(self) -> bool:
        """Whether there is a graph by now."""
        return self._captured is not None

    def run(self, *inputs: Tensor) -> Tensor:
        """Do the work, by replay where there is a graph for it."""
        if (
            self._graph is False
            or not _on_gpu(inputs)
            or torch.cuda.is_current_stream_capturing()  # somebody else's graph
        ):
            return self.eager(*inputs)
        signature = (
            *((t.device, t.dtype, t.shape, t.stride()) for t in inputs),
            torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        )
        state = self.state()
        captured = self._captured
        if captured is not None and captured.state == state:
            if captured.signature == signature:
                return self._replay(captured, inputs)
            return self.eager(*inputs)
        if state != self._state:
            self._state = state
            self._seen.clear()
        seen = self._seen.get(signature, 0)
        if seen < WARM_UP:
            return self._warm_up(inputs, signature, seen + 1)
        if self._captures >= _MOST_CAPTURES:
            return self.eager(*inputs)
        try:
            captured = self._capture(inputs, signature)
        except CannotCapture as error:
            self._give_up(str(error))
            return self.eager(*inputs)
        return self._replay(captured, inputs)

    def _give_up(self, reason: str) -> None:
        if self._graph is True:
            raise RtkError(
                f"{self._what}: graph=True, but this cannot be captured in a CUDA graph: {reason}; "
                "use graph='auto' or False"
            )
        self._graph = False
        self._captured = None
        warnings.warn(
            f"{self._what}: runs without a CUDA graph, which is slower: {reason}", stacklevel=4
        )

    def _warm_up(
        self, inputs: tuple[Tensor, ...], signature: tuple[object, ...], seen: int
    ) -> Tensor:
        # On the stream of the capture, as what a library sets up may belong to a stream.
        current = torch.cuda.current_stream(inputs[0].device)
        stream = _side_stream(inputs[0].device)
        stream.wait_stream(current)
        synchronises = [False]
        try:
            with torch.cuda.stream(stream):
                if seen < WARM_UP:
                    result = self.eager(*inputs)
                else:  # a capture that waits breaks off: found here, it leaves nothing to clean up
                    with _synchronisations() as synchronises:
                        result = self.rehearse(*inputs)
        finally:
            current.wait_stream(stream)
        self._seen[signature] = seen
        self._state = self.state()  # the work itself may have changed it: an optimiser's first step
        if synchronises[0]:
            self._give_up("it waits for the GPU, e.g. with .item() or a branch on a tensor's value")
        return result

    def _capture(self, inputs: tuple[Tensor, ...], signature: tuple[object, ...]) -> _Captured:
        """Capture `recorded`, or raise CannotCapture and leave everything as it was."""
        device, stream = inputs[0].device, _side_stream(inputs[0].device)
        torch.cuda.synchronize(device)
        self._captured = None  # its memory is for the new one
        static = tuple(torch.empty_like(t, requires_grad=False) for t in inputs)
        for mine, theirs in zip(static, inputs, strict=True):
            mine.copy_(theirs.detach())
        pool = torch.cuda.graph_pool_handle()
        generator = torch.cuda.default_generators[device.index]
        before = generator.clone_state()
        graph = torch.cuda.CUDAGraph()
        failure: Exception | None = None
        result: Tensor | None = None
        torch.clear_autocast_cache()  # a cast from outside would be stale in every replay
        with (
            self.recording(),
            _host_randomness_unused(),
            torch.cuda.device(device),
            torch.cuda.stream(stream),
        ):
            gc.collect()  # here: what is collected inside a capture may break it
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # the eager calls' memory, which a graph cannot use
            try:
                # Only this thread is kept from unsafe calls: others may load data meanwhile.
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                result = self.recorded(*static)
            except Exception as error:
                failure = error.with_traceback(None)  # its frames hold memory of the pool
            finally:
                torch.clear_autocast_cache()
                try:
                    graph.capture_end()
                except RuntimeError as error:
                    failure = failure or error.with_traceback(None)
                    _clean_up(device, pool, generator, before)
            if failure is not None:
                raise CannotCapture(_first_line(failure))
            if self.state() != self._state:
                raise CannotCapture("it replaces weights, buffers or optimiser state as it runs")
        assert result is not None
        self._captures += 1
        self._captured = _Captured(graph, static, result, signature, self._state)
        return self._captured

    def _replay(self, captured: _Captured, inputs: tuple[Tensor, ...]) -> Tensor:
        for mine, theirs in zip(captured.inputs, inputs, strict=True):
            mine.copy_(theirs.detach())
        self.refresh()
        captured.graph.replay()
        return captured.result.clone()  # the next replay writes over it


class Seed:
    """The random seed of an attack, on the device for a graph to read.

    An attack takes part by a method `draw_seed() -> int | None`, which its own calls use too (None:
    it needs none), and a keyword `seed`, which may be a one-element int64 tensor.
    """

    def __init__(self, attack: object, device: torch.device) -> None:
        self._draw: Callable[[], int | None] = getattr(attack, "draw_seed", lambda: None)
        self._value = torch.zeros(1, dtype=torch.int64, device=device)
        self.arguments: dict[str, Any] = {}  # the keyword to call the attack with

    def refresh(self) -> None:
        """Draw as an eager call would: both start alike after the same torch.manual_seed."""
        seed = self._draw()
        self.arguments = {} if seed is None else {"seed": self._value}
        if seed is not None:
            self._value.fill_(seed)  # travels as a kernel's argument: nothing to wait for


def renew_accumulators(parameters: Iterable[Tensor]) -> None:
    """Let the next forward give each parameter a new node that gathers its gradient.

    Such a node belongs to the stream of the forward that made it, and lives as long as any autograd
    graph that it is part of. A module that keeps its last activation, or a caller that holds a
    loss, on the default stream would keep a backward of the same weights from being captured. The
    old graphs still accumulate into the same `grad`.
    """
    for parameter in parameters:
        data = parameter.data
        if type(data) is not Tensor:  # a subclass, whose memory is its own affair
            continue
        # autograd forgets the node when the dtype changes; the memory stays, nothing is copied.
        other = torch.float32 if data.dtype != torch.float32 else torch.float64
        parameter.data = data.new_empty(0, dtype=other)
        parameter.data = data


def model_state(model: nn.Module) -> list[object]:
    """Return what a graph of `model` depends on: its modules, their modes, where tensors lie."""
    found: list[object] = []
    waiting: list[nn.Module | None] = [model]
    met: set[nn.Module] = set()
    for module in waiting:  # grows meanwhile; model.modules() would take twice as long
        if module is None or module in met:
            continue
        met.add(module)
        found += (module, module.training)
        for parameter in module._parameters.values():
            if parameter is not None:
                found += (parameter.data_ptr(), parameter.requires_grad)
        for buffer in module._buffers.values():
            if buffer is not None:
                found.append(buffer.data_ptr())
        waiting.extend(module._modules.values())
    return found


def plain_settings(thing: object) -> list[object]:
    """Return the public numbers, names and switches among an object's attributes."""
    return [
        (name, value)
        for name, value in getattr(thing, "__dict__", {}).items()
        if not name.startswith("_") and (value is None or isinstance(value, int | float | str))
    ]


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return this thread's stream for warming up and capturing.

    One, not one a graph: cuBLAS keeps 65 MB of workspaces for every stream that it has seen.
    """
    return _stream_of(device, threading.get_ident())


@functools.cache
def _stream_of(device: torch.device, thread: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _on_gpu(tensors: tuple[Tensor, ...]) -> bool:
    return all(tensor.is_cuda for tensor in tensors)


@contextlib.contextmanager
def _synchronisations() -> Iterator[list[bool]]:
    """Yield a list whose one element says, after the `with`, whether torch waited for the GPU."""
    found = [False]
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        text = str(warning.message)
        if _SYNCHRONISES in text:
            found[0] = True
        elif not text.startswith("Synchronization debug mode"):
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


@contextlib.contextmanager
def _host_randomness_unused() -> Iterator[None]:
    """Refuse work that draws from a host generator, whose draw every replay would repeat.

    The generators are left as they were, whatever happened.
    """
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    drawn = False
    try:
        yield
    finally:
        now = torch.get_rng_state(), random.getstate(), np.random.get_state()
        drawn = (
            not torch.equal(before[0], now[0])
            or before[1] != now[1]
            or any(not np.array_equal(a, b) for a, b in zip(before[2], now[2], strict=True))
        )
        if drawn:
            torch.set_rng_state(before[0])
            random.setstate(before[1])
            np.random.set_state(before[2])
    if drawn:
        raise CannotCapture("it draws random numbers on the CPU, which every replay would repeat")


def _clean_up(
    device: torch.device, pool: Any, generator: torch.Generator, before: torch.Generator
) -> None:
    """Put right what torch leaves behind where CUDA itself refused a capture.

    The allocator believes that it goes on, and never frees the pool; the random generator believes
    so too, and refuses to serve dropout outside.
    """
    for leave in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
        with contextlib.suppress(RuntimeError):  # it was done before capture_end failed
            leave(device.index, pool)
    generator.graphsafe_set_state(before)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
