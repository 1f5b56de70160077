"""Ticket: which weights of a network are kept. A file of bit-packed masks that describes itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from rtk import artifact
from rtk.errors import RtkError
from rtk.granularity import Granularity, recognise
from rtk.nn import mask_model
from rtk.nn._masked import MaskedLayer
from rtk.nn.convert import check_fits

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
    def from_torch_prune(cls, model: nn.Module | Mapping[str, Tensor]) -> Ticket:
        """Return the ticket that `torch.nn.utils.prune` left in a model, or in its state dict.

        A mask of whole rows, kernels or output channels in every convolution becomes one of that
        granularity.

        Args:
            model: with `weight_mask` buffers, or a state dict with `LAYER.weight_mask` keys, with
                or without the `module.` of a parallel model.

        Raises:
            RtkError: if there are none.
        """
        state = model.state_dict() if isinstance(model, nn.Module) else model
        masks = {
            name.removesuffix("weight_mask").removesuffix(".").removeprefix("module."): mask != 0
            for name, mask in state.items()
            if name.rpartition(".")[2] == "weight_mask"
        }
        if not masks:
            raise RtkError(
                "the model has no weight_mask buffers; prune it with torch.nn.utils.prune first "
                "(prune.remove drops them)"
            )
        shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
        return cls(_on_cpu(_collapsed(masks)), shapes)

    def to_torch_prune(self, model: nn.Module) -> nn.Module:
        """Prune `model` in place by `torch.nn.utils.prune`, and return it.

        Each weight becomes `weight_orig` and a `weight_mask` of its shape, which other tools read;
        `prune.remove(layer, "weight")` makes that permanent. `from_torch_prune` gives the ticket
        back.

        Args:
            model: with plain layers, whose weights are parameters.

        Raises:
            RtkError: if the ticket is for another architecture, stem or width, its masks do not
                fit, or a layer is masked or pruned already; then nothing has been changed.
        """
        self.check_model(getattr(model, "spec", None))
        check_fits(model, self)
        modules = dict(model.named_modules())
        for name in self.masks:
            if isinstance(modules[name], MaskedLayer):
                raise RtkError(
                    f"layer {name!r} is masked by rtk already; make that permanent with "
                    "rtk.nn.fold, or prune the dense network"
                )
        for name, mask in self.masks.items():
            weight = modules[name].weight
            whole = mask.expand(weight.shape).to(weight.device)
            prune.custom_from_mask(modules[name], "weight", whole)
        return model


def _on_cpu(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: mask.cpu().clone() for name, mask in masks.items()}


def _collapsed(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the masks in the smallest shape that all convolutions' masks have.

    Masks that are all of one value have any shape, and so they do not tell.
    """
    convolutions = [mask for mask in masks.values() if mask.dim() == 4]
    telling = [mask.shape for mask in convolutions if mask.any() and not mask.all()]
    for name in ("channel", "kernel", "row"):
        granularity = Granularity.parse(name)
        kept = 4 - granularity.shared
        told = any(shape[kept:].numel() > 1 for shape in telling)
        if told and all(granularity.holds(mask, mask.shape) for mask in convolutions):
            first = (slice(None),) * kept + (slice(1),) * granularity.shared
            return {n: mask[first] if mask.dim() == 4 else mask for n, mask in masks.items()}
    return masks


def _pack(mask: Tensor) -> Tensor:
    """Pack a bool mask into bytes, the first element in the lowest bit."""
    bits = mask.reshape(-1).cpu().to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).reshape(-1, 8)
    return (bits * _BITS).sum(1, dtype=torch.uint8)


def _unpack(packed: Tensor, shape: list[int]) -> Tensor:
    bits = (packed[:, None] & _BITS).bool().reshape(-1)
    return bits[: torch.Size(shape).numel()].reshape(shape)
