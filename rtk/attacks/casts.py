"""CastOnce: autocast's casts of weights that are constants, made once and not in every call."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# (input, weight, bias, ...): what autocast runs in its lower precision and networks consist of.
_WEIGHTED = frozenset(
    (
        torch.conv1d,
        torch.conv2d,
        torch.conv3d,
        torch.conv_transpose1d,
        torch.conv_transpose2d,
        torch.conv_transpose3d,
        F.linear,
    )
)


class CastOnce(TorchFunctionMode):
    """Inside the `with`, a parameter that autocast would cast for an operator is cast once.

    Autocast keeps the casts of leaves that require grad only (`cached_cast` in ATen's
    autocast_mode.cpp), so weights that are frozen are cast again in every call. The casts are the
    same ones, at the same places: where autocast is off, nothing is cast. They are kept as long as
    this object, which may be entered again; meanwhile the parameters must not change.
    """

    def __init__(self) -> None:
        super().__init__()
        self._casts: dict[tuple[int, torch.dtype], Tensor] = {}
        self._parameters: list[Tensor] = []  # kept, so that their ids stay theirs

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Compiled code keeps to itself: what it returns may lie in memory that it uses again.
        if func in _WEIGHTED and not torch.compiler.is_compiling():
            args = (*args[:1], *(self._cast(argument) for argument in args[1:3]), *args[3:])
        return func(*args, **(kwargs or {}))

    def _cast(self, argument: Any) -> Any:
        if type(argument) is not nn.Parameter or argument.requires_grad:
            return argument
        kind = argument.device.type
        if argument.dtype != torch.float32 or not torch.is_autocast_enabled(kind):
            return argument
        dtype = torch.get_autocast_dtype(kind)
        key = id(argument), dtype
        if key not in self._casts:
            self._casts[key] = argument.detach().to(dtype)
            self._parameters.append(argument)
        return self._casts[key]
