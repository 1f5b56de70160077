"""Whether an attack's gradients come from a fused program, and the programs of all models."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rtk import ops
from rtk.attacks.fused.program import FusedProgram
from rtk.attacks.fused.verify import Loss, Plain, verify
from rtk.attacks.fused.wrappers import unwrap
from rtk.nn._fused.layers import NotApplicable
from rtk.nn._fused.reader import recognise
from rtk.nn._trace import has_hooks
from rtk.ops import engine

_BatchNorm = nn.modules.batchnorm._BatchNorm

_enabled = os.environ.get("RTK_FUSED_ATTACK", "1") != "0"


@contextlib.contextmanager
def enabled(on: bool = True) -> Iterator[None]:
    """Allow, or with False forbid, the fused path inside the `with`, in the whole process.

    The environment variable RTK_FUSED_ATTACK=0 forbids it from the start.
    """
    global _enabled
    previous, _enabled = _enabled, on
    try:
        yield
    finally:
        _enabled = previous


def why_not(model: nn.Module) -> str | None:
    """Return why a model, in eval mode, has no fused program; None where it has one."""
    try:
        recognise(unwrap(model))
    except NotApplicable as error:
        return str(error)
    return None


@dataclass
class _Entry:
    """What is known of a model.

    Attributes:
        modules: what a structure is read from; when it changes all is found out anew.
        tensors: where weights lie; when they move only the plan is made anew.
        program: None where there is none, or none that can be trusted.
        verified: whether it was compared with autograd.
        in_graphs: programs that CUDA graphs replay; their memory stays as long as the model.
    """

    modules: list[object]
    tensors: list[int]
    program: FusedProgram | None = None
    verified: bool = False
    in_graphs: list[FusedProgram] = field(default_factory=list)


_entries: WeakKeyDictionary[nn.Module, _Entry] = WeakKeyDictionary()
_warned_of_capture = False


class Route:
    """The fused path of one attack, or the finding that there is none.

    Args:
        model: what is attacked; it does not change as long as this is used.
        loss: of (logits, y).
        plain: (model, x, y, loss) -> (gradient, logits), by autograd: to compare with.
        bn_mode: a program has batch norms in "eval" only.
    """

    def __init__(self, model: nn.Module, loss: Loss, plain: Plain, bn_mode: str) -> None:
        self._model = unwrap(model)
        self._loss = loss
        self._plain = plain
        self._eval = bn_mode == "eval"
        self._program: FusedProgram | None = None
        self._started = False

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return (gradient in bf16, logits), or None where autograd has to do it.

        The first call folds the weights; the first one of a model also compares with autograd,
        which synchronises.
        """
        if not (_enabled and engine.is_on() and self._eval and serves(x)):
            return None
        if not self._started:
            self._started = True
            self._program = self._start(x, y)
        if self._program is None:
            return None
        try:
            return self._program.gradient(x, y, self._loss)
        except Exception as error:
            self._give_up(error, x)
            return None

    def _start(self, x: Tensor, y: Tensor) -> FusedProgram | None:
        modules, tensors = _signature(self._model)
        entry = _entries.get(self._model)
        if entry is None or entry.modules != modules or entry.tensors != tensors:
            if _capturing(x):
                _warn_of_capture()
                return None
            entry = _entries[self._model] = self._find_out(modules, tensors, entry)
        program = entry.program
        if program is None or program.device != x.device:
            return None
        if _capturing(x):
            if not entry.verified:
                _warn_of_capture()
                return None
            if program not in entry.in_graphs:
                entry.in_graphs.append(program)
        try:
            program.refold()
            if not entry.verified:
                verify(program, self._model, x, y, self._plain)
                entry.verified = True
                with ops.tuning():
                    program.gradient(x, y, self._loss)
        except Exception as error:
            self._give_up(error, x)
            return None
        return program

    def _find_out(self, modules: list[object], tensors: list[int], before: _Entry | None) -> _Entry:
        entry = _Entry(modules, tensors)
        structure = None
        if before is not None:
            entry.in_graphs = before.in_graphs
            if before.modules == modules:
                if before.program is None:
                    return entry
                structure, entry.verified = before.program.structure, before.verified
        with contextlib.suppress(NotApplicable):
            entry.program = FusedProgram(self._model, structure=structure)
        return entry

    def _give_up(self, error: Exception, x: Tensor) -> None:
        """Leave the model to autograd for good and say why; where that is no way out, raise."""
        if isinstance(error, torch.OutOfMemoryError) or _capturing(x):
            raise error
        self._program = None
        _entries[self._model].program = None
        lines = str(error).strip().splitlines()
        warnings.warn(
            f"attack: {type(self._model).__name__} is attacked by autograd, which is slower; the "
            f"fused program fails: {lines[0] if lines else type(error).__name__}",
            stacklevel=5,
        )


def serves(x: Tensor) -> bool:
    """Return whether the fused path is for these images: on a GPU, under autocast to bf16."""
    return (
        x.is_cuda
        and len(x) > 0
        and torch.is_autocast_enabled("cuda")
        and torch.get_autocast_dtype("cuda") == torch.bfloat16
    )


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _warn_of_capture() -> None:
    global _warned_of_capture
    if not _warned_of_capture:
        _warned_of_capture = True
        warnings.warn(
            "attack: a CUDA graph is being captured before the fused program of this model was "
            "tried, so it holds the slower path; attack once before capturing",
            stacklevel=6,
        )


def _signature(model: nn.Module) -> tuple[list[object], list[int]]:
    """Return what a structure depends on, and where the tensors lie: quickly.

    Not the model itself, which would keep its own entry alive.
    """
    modules: list[object] = []
    tensors: list[int] = []
    for module in model.modules():
        if module is not model:
            modules.append(module)
        modules.append(has_hooks(module))
        folded = isinstance(module, nn.Conv2d | _BatchNorm)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                modules.append(tensor.dtype)
                (tensors if folded else modules).append(tensor.data_ptr())
    return modules, tensors
