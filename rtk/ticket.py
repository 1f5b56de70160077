"""Ticket: which weights of a network are kept. A file of bit-packed masks that describes itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rtk import artifact
from rtk.errors import RtkError
from rtk.granularity import Granularity, recognise
from rtk.nn import mask_model
from rtk.nn._masked import MaskedLayer

TICKET = "ticket.safetensors"  # its name in the folder of the run that drew it

_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
_MODEL_KEYS = ("arch", "stem", "width")


@dataclass(frozen=True)
class Ticket:
    """A sparse subnetwork: one bool mask a layer, and where it comes from.

    Args:
        masks: layer name -> bool mask, True where the weight is kept; each mask has the weight's
            number of dimensions and broadcasts to it.
        shapes: layer name -> shape of the weight (by default the masks' own).
        meta: what JSON can hold: scheme, requested sparsity, granularity, scope, model (arch,
            stem, width, mean, std), source checkpoint's SHA-256, the full recipe, rtk's version.

    Raises:
        RtkError: for a mask that is not bool, that does not broadcast to its weight's shape, or
            that has not the structure of the granularity which `meta` claims.
    """

    masks: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shapes = {n: tuple(self.shapes.get(n, m.shape)) for n, m in self.masks.items()}
        object.__setattr__(self, "shapes", shapes)
        for name, mask in self.masks.items():
            if mask.dtype != torch.bool:
                raise RtkError(f"ticket: the mask of {name!r} must be bool, got {mask.dtype}")
            fits = mask.dim() == len(shapes[name]) and all(
                a in (1, b) for a, b in zip(mask.shape, shapes[name], strict=True)
            )
            if not fits:
                raise RtkError(
                    f"ticket: the mask of {name!r} must broadcast to {shapes[name]}, "
                    f"got {tuple(mask.shape)}"
                )
        self._check_granularity()

    def _check_granularity(self) -> None:
        if "granularity" not in self.meta:
            return
        claimed = Granularity.parse(self.meta["granularity"])
        for name, mask in self.masks.items():
            if mask.dim() == 4 and not claimed.holds(mask, self.shapes[name]):
                raise RtkError(
                    f"ticket: its meta says granularity {claimed.name}, which the mask of {name!r} "
                    f"has not; leave the key out, and the ticket reads it off the masks"
                )

    @property
    def granularity(self) -> str:
        """element, row, kernel, channel, block-64, 2:4, ...: as `rtk.granularity` reads names.

        What the ticket was drawn at; else the coarsest that the masks of its convolutions allow.
        """
        if "granularity" in self.meta:
            return Granularity.parse(self.meta["granularity"]).name
        masks = {n: m for n, m in self.masks.items() if m.dim() == 4}
        return recognise([*masks.values()], [self.shapes[n] for n in masks]).name

    @property
    def sparsity(self) -> float:
        """The fraction of the weights under the masks that is zero."""
        total = kept = 0
        for name, mask in self.masks.items():
            size = 1
            for length in self.shapes[name]:
                size *= length
            total += size
            kept += int(mask.sum()) * (size // max(1, mask.numel()))
        return 1 - kept / total if total else 0.0

    def __repr__(self) -> str:
        return f"Ticket({len(self.masks)} layers, {self.granularity}, sparsity {self.sparsity:.4f})"

    def save(self, path: str | Path) -> str:
        """Write the ticket atomically as safetensors and return its SHA-256."""
        self._check_granularity()  # masks may have been changed in place
        tensors = {name: _pack(mask) for name, mask in self.masks.items()}
        layout = [  # a list, because JSON's objects come back sorted and layers have an order
            {"layer": name, "mask": list(mask.shape), "weight": list(self.shapes[name])}
            for name, mask in self.masks.items()
        ]
        meta = {
            **{key: value for key, value in self.meta.items() if key != "sha256"},
            "granularity": self.granularity,
            "actual_sparsity": self.sparsity,
            "layout": layout,
        }
        return artifact.save(path, "ticket", tensors, meta)

    @classmethod
    def load(cls, path: str | Path) -> Ticket:
        """Read a ticket; a damaged, foreign or pickled file raises an RtkError."""
        tensors, meta, sha256 = artifact.load(path, "ticket")
        layout = meta.pop("layout")
        for name in ("kind", "format", "actual_sparsity"):
            meta.pop(name)
        masks = {of["layer"]: _unpack(tensors[of["layer"]], of["mask"]) for of in layout}
        weights = {of["layer"]: tuple(of["weight"]) for of in layout}
        return cls(masks, weights, {**meta, "sha256": sha256})

    def apply(self, model: nn.Module) -> nn.Module:
        """Mask `model` in place (`rtk.nn.mask_model`) and return it.

        Raises:
            RtkError: if the ticket is for another architecture, stem or width, or its masks do
                not fit; then nothing has been changed.
        """
        self.check_model(getattr(model, "spec", None))
        return mask_model(model, self)

    def check_model(self, spec: Any) -> None:
        """Raise an RtkError where the ticket says it is for another network than `spec`."""
        ours = self.meta.get("model") or {}
        for key in _MODEL_KEYS:
            theirs = getattr(spec, key, None)
            if key in ours and theirs is not None and ours[key] != theirs:
                raise RtkError(
                    f"the ticket is for {key} {ours[key]}, the model has {key} {theirs}; "
                    "draw a ticket from this model, or use the checkpoint it was drawn from"
                )

    @classmethod
    def from_model(cls, model: nn.Module) -> Ticket:
        """Return the ticket that a model with masked layers holds (floating masks: non-zero)."""
        masks, shapes = {}, {}
        for name, module in model.named_modules():
            if isinstance(module, MaskedLayer):
                mask = module.mask.detach() != 0
                masks[name] = mask.reshape((1,) * (module.weight.dim() - mask.dim()) + mask.shape)
                shapes[name] = tuple(module.weight.shape)
        if not masks:
            raise RtkError("the model has no masked layers; apply a ticket or use rtk.draw first")
        return cls(_on_cpu(masks), shapes)

    @classmethod
    def from_torch_prune(cls, model: nn.Module) -> Ticket:
        """Return the ticket that `torch.nn.utils.prune` left in a model (`weight_mask` buffers)."""
        masks = {
            name: module.weight_mask.detach().bool()
            for name, module in model.named_modules()
            if isinstance(getattr(module, "weight_mask", None), Tensor)
        }
        if not masks:
            raise RtkError(
                "the model has no weight_mask buffers; prune it with torch.nn.utils.prune first "
                "(prune.remove drops them)"
            )
        return cls(_on_cpu(masks))


def _on_cpu(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: mask.cpu().clone() for name, mask in masks.items()}


def _pack(mask: Tensor) -> Tensor:
    """Pack a bool mask into bytes, the first element in the lowest bit."""
    bits = mask.reshape(-1).cpu().to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).reshape(-1, 8)
    return (bits * _BITS).sum(1, dtype=torch.uint8)


def _unpack(packed: Tensor, shape: list[int]) -> Tensor:
    bits = (packed[:, None] & _BITS).bool().reshape(-1)
    return bits[: torch.Size(shape).numel()].reshape(shape)
