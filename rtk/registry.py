"""Names to things: one registry per kind of extension (model, data set, scheme, attack)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from rtk.errors import check_choice

T = TypeVar("T")


class Registry(Generic[T]):
    """A name -> object table whose look-up error lists the known names and the nearest one.

    >>> models: Registry[type] = Registry("model")
    >>> @models.register("resnet18")
    ... class ResNet18: ...
    >>> models.get("resnet18")
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorate the thing that `name` stands for; a name is taken once."""

        def add(entry: T) -> T:
            assert name not in self._entries, f"{self.kind} {name!r} is registered twice"
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """Return what `name` stands for, or raise an RtkError."""
        return self._entries[check_choice(self.kind, name, self._entries)]

    def names(self) -> list[str]:
        return list(self._entries)
