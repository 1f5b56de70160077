"""Sets that stay in memory from one stage to the next, where one process runs many of them."""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from rtk.config import DataConfig

MOST_BYTES = 4 * 2**30

T = TypeVar("T")
_kept: OrderedDict[tuple[str, DataConfig], Any] | None = None


@contextlib.contextmanager
def keep_loaded() -> Iterator[None]:
    """Inside the `with`, a set that is loaded again is the one that was loaded before.

    At most `MOST_BYTES` of images are kept, those used last. Files that change meanwhile are not
    read anew.
    """
    global _kept
    before, _kept = _kept, OrderedDict()
    try:
        yield
    finally:
        _kept = before


def kept(load: Callable[[DataConfig], T]) -> Callable[[DataConfig], T]:
    """Let a function that loads a set keep what it returns, inside `keep_loaded`."""

    @functools.wraps(load)
    def loaded(config: DataConfig) -> T:
        if _kept is None:
            return load(config)
        key = load.__module__, config
        if key not in _kept:
            _kept[key] = load(config)
        _kept.move_to_end(key)
        result: T = _kept[key]
        while sum(map(_size, _kept.values())) > MOST_BYTES:
            _kept.popitem(last=False)
        return result

    return loaded


def _size(dataset: Any) -> int:
    """Return the bytes of a set's images in memory; those that are read from files take none."""
    images = [vars(split).get("images") for split in dataset.splits().values()]
    return sum(each.numel() * each.element_size() for each in images if each is not None)
