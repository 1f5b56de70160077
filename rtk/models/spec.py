"""What a network is: everything needed to build it again around stored weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from rtk.errors import RtkError, check_choice, did_you_mean

STEMS = ("3x3", "7x7", "own")  # own: a library's network, whose stem is part of it
LIBRARIES = ("torchvision", "timm")


def is_from_library(arch: str) -> bool:
    """Whether `arch` is a full name like torchvision:densenet121: no network of rtk's own."""
    return arch.partition(":")[0] in LIBRARIES and ":" in arch


def resolve_stem(stem: str, image_size: int, arch: str = "resnet18") -> str:
    """Return "3x3" or "7x7", "auto" being "3x3" up to 64 pixels; or "own" for a library's network.

    Args:
        stem: auto, 3x3 (no max-pool, small images), 7x7 (stride 2 and max-pool, ImageNet) or own.
        image_size: height of the images, in pixels.
        arch: the architecture's full name (`rtk.models.resolve_arch`).

    Raises:
        RtkError: for a stem that the architecture cannot have.
    """
    check_choice("stem", stem, ("auto", *STEMS))
    if is_from_library(arch):
        check_stem(arch, "own" if stem == "auto" else stem)
        return "own"
    if stem != "auto":
        check_stem(arch, stem)
        return stem
    return "3x3" if image_size <= 64 else "7x7"


def check_stem(arch: str, stem: str) -> None:
    """Raise an RtkError where the architecture `arch` cannot have `stem`."""
    if is_from_library(arch) and stem != "own":
        raise RtkError(
            f"model stem: expected auto for {arch}, whose stem is its own, got {stem!r}; the stems "
            "3x3 and 7x7 are of rtk's ResNets"
        )
    if not is_from_library(arch) and stem == "own":
        raise RtkError(
            f"model stem: expected 3x3 or 7x7 for {arch}, got 'own'; or leave it at auto"
        )


def _triple(name: str, values: Any) -> tuple[float, float, float]:
    try:
        r, g, b = (float(value) for value in values)
    except (TypeError, ValueError):
        raise RtkError(f"model {name}: expected 3 numbers, one a channel, got {values!r}") from None
    return r, g, b


@dataclass(frozen=True)
class ModelSpec:
    """A network's architecture and normalisation.

    Args:
        arch: a registered model, e.g. resnet18, or a library's, e.g. torchvision:densenet121.
        stem: 3x3 or 7x7; own for a library's network (`resolve_stem` turns auto into one).
        width: multiplier of every layer's channels, > 0; 1 for a library's network.
        num_classes: outputs of the head, >= 1.
        mean: of each channel of the images, in [0, 1] scale.
        std: of each channel, > 0.

    Raises:
        RtkError: where a value is out of its range.
    """

    arch: str
    stem: str
    width: float
    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if self.stem == "auto":
            raise RtkError("model stem 'auto' is not resolved; see rtk.models.resolve_stem")
        check_choice("stem", self.stem, STEMS)
        if not self.width > 0:
            raise RtkError(f"model width: expected a positive multiplier, got {self.width!r}")
        if self.num_classes < 1:
            raise RtkError(f"model num_classes: expected at least 1, got {self.num_classes!r}")
        object.__setattr__(self, "mean", _triple("mean", self.mean))
        object.__setattr__(self, "std", _triple("std", self.std))
        if not min(self.std) > 0:
            raise RtkError(f"model std: expected 3 positive numbers, got {self.std}")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON holds them; `from_dict` gives the spec back."""
        return {**dataclasses.asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelSpec:
        """Build a spec from what `to_dict` gave; an unknown or missing key raises an RtkError."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise RtkError(f"a model spec has no key {name!r}{did_you_mean(name, names)}")
        missing = [name for name in names if name not in values]
        if missing:
            raise RtkError(f"a model spec needs {', '.join(missing)}; got {', '.join(values)}")
        return cls(**values)
