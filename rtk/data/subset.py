"""Class subsets: digits[0-4], cifar10[0,2,5-7]."""

from __future__ import annotations

import re

import torch

from rtk.data.dataset import Dataset, Split
from rtk.errors import RtkError

_SUBSET = re.compile(r"(.*)\[([^\[\]]*)\]", re.DOTALL)


def split_name(name: str) -> tuple[str, str | None]:
    """Return a set's name and the text in the brackets after it, or None without brackets."""
    match = _SUBSET.fullmatch(name)
    return (match[1], match[2]) if match else (name, None)


def parse_classes(text: str, name: str) -> list[int]:
    """Return the class indices that `0,2,5-7` stands for, in that order.

    Raises RtkError where it is empty, malformed or names a class twice; `name` is for the message.
    """
    if not text.strip():
        raise RtkError(f"{name}: the class subset is empty; write e.g. [0-4] or [0,2,5-7]")
    picks: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,6})\s*(?:-\s*([0-9]{1,6})\s*)?", item)
        if not match or (match[2] is not None and int(match[2]) < int(match[1])):
            raise RtkError(
                f"{name}: class subset [{text}] is malformed at {item!r}; "
                "write indices and rising ranges, e.g. [0-4] or [0,2,5-7]"
            )
        picks += range(int(match[1]), int(match[2] or match[1]) + 1)
    twice = sorted({pick for pick in picks if picks.count(pick) > 1})
    if twice:
        raise RtkError(f"{name}: the class subset names class {twice[0]} twice (a duplicate)")
    return picks


def take_classes(dataset: Dataset, picks: list[int]) -> Dataset:
    """Return the images of the classes `picks`, relabelled 0, 1, ... in that order.

    Raises RtkError where a class is unknown, or a split holds no image of the chosen ones.
    """
    count = len(dataset.classes)
    unknown = [pick for pick in picks if not 0 <= pick < count]
    if unknown:
        raise RtkError(
            f"{dataset.name}: unknown class {unknown[0]} in the subset; its classes are "
            f"0..{count - 1}"
        )
    new_label = torch.full((count,), -1)
    new_label[picks] = torch.arange(len(picks))

    def take(part: str, split: Split) -> Split:
        labels = new_label[split.labels]
        chosen = labels >= 0
        if not chosen.any():
            raise RtkError(f"{dataset.name}: no {part} image is of the chosen classes")
        return split.relabel(labels).select(chosen)

    return dataset.map_splits(take, classes=tuple(dataset.classes[pick] for pick in picks))
