"""What masked layers share: a mask beside the weight, in the state_dict, never lost on load."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rtk.ops.prepare_weight import apply_mask, check_mask

# By the input's shape: the paths of the forward, the input's and the weight's gradient.
Paths = dict[tuple[int, ...], tuple[str, str, str]]


class MaskedLayer(nn.Module):
    """Mixin for a layer with a `weight` that is used times a `mask`.

    A bool mask prunes for good: the weights it prunes are set to 0, and as their gradient is
    exactly 0 an optimiser leaves them there. A floating mask scales in the forward only and
    leaves the weights as they are; assign it as an nn.Parameter to learn it.
    """

    weight: Tensor
    bias: Any  # a Parameter or None; Conv2d and Linear declare it differently
    mask: Tensor
    _legend: str

    def _init_mask(self, mask: Tensor | None) -> None:
        self.register_buffer(
            "mask", torch.ones(self.weight.shape, dtype=torch.bool, device=self.weight.device)
        )
        if mask is not None:
            self.set_mask(mask)

    def set_mask(self, mask: Tensor) -> None:
        """Use `mask` from now on.

        Args:
            mask: bool or floating, broadcasts to the weight; an nn.Parameter is registered as one.

        Raises:
            RtkError: if it does not broadcast, or is neither bool nor floating.
        """
        if not isinstance(mask, nn.Parameter):
            mask = mask.to(self.weight.device)
            # An expanded mask cannot be copied into, which loading a state_dict does.
            mask = mask.clone() if 0 in mask.stride() else mask
        check_mask(type(self).__name__, self._legend, self.weight, mask)
        if not isinstance(mask, nn.Parameter) and "mask" in self._buffers:
            self.mask = mask
        else:
            self._buffers.pop("mask", None)
            self._parameters.pop("mask", None)
            if isinstance(mask, nn.Parameter):
                self.register_parameter("mask", mask)
            else:
                self.register_buffer("mask", mask)
        self._zero_pruned()

    def _zero_pruned(self) -> None:
        if self.mask.dtype == torch.bool:
            with torch.no_grad():
                self.weight.masked_fill_(~self.mask, 0)

    @property
    def sparsity(self) -> float:
        """The fraction of the weight that the mask sets to zero."""
        kept = (self.mask != 0).sum().item() * (self.weight.numel() / self.mask.numel())
        return 1 - kept / self.weight.numel()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # A plain layer's state has no mask: ours stays. A mask of another granularity may come.
        key = prefix + "mask"
        loaded = state_dict.get(key)
        if loaded is None:
            state_dict[key] = self.mask
        elif loaded.shape != self.mask.shape or loaded.dtype != self.mask.dtype:
            check_mask(f"loading {key}", self._legend, self.weight, loaded.to(self.weight.device))
            if not isinstance(self.mask, nn.Parameter):
                self.mask = torch.empty_like(loaded, device=self.weight.device)
            elif loaded.shape != self.mask.shape:  # it stays a Parameter, in its own dtype
                new = self.mask.new_empty(loaded.shape)
                self.mask = nn.Parameter(new, requires_grad=self.mask.requires_grad)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[misc]
        if loaded is None:
            del state_dict[key]
        self._zero_pruned()


def adopt(layer: MaskedLayer, plain: nn.Module, mask: Tensor | None) -> None:
    """Give `layer`, made on the meta device, `plain`'s parameters and mode."""
    layer.register_parameter("weight", plain.get_parameter("weight"))
    layer.register_parameter("bias", plain._parameters["bias"])
    layer.train(plain.training)
    layer._init_mask(mask)


def fold_into(plain: nn.Module, layer: MaskedLayer) -> None:
    """Give `plain`, made on the meta device, copies of the layer's masked weight and bias."""
    masked = apply_mask(layer.weight.detach(), layer.mask.detach()).to(layer.weight.dtype)
    plain.weight = nn.Parameter(masked.clone(), requires_grad=layer.weight.requires_grad)
    if layer.bias is not None:
        bias = layer.bias
        plain.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    plain.train(layer.training)


def capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
