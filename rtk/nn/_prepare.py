"""All masked convolutions of a model prepared by one launch, when its forward begins.

A layer alone masks and casts its weight itself, in a launch of its own. `mask_model` hangs a hook
before and one after the model's forward: the first folds all masks into one arena, where the layers
find their weights until the second. So a weight is as fresh as the forward that uses it, however it
was changed, and in a captured CUDA graph the launch is part of the graph. Layers that `tune` gave
another path than cuDNN find the lists that it reads there too.

The way back is one node of autograd for all layers: the convolutions are PyTorch's own, of weights
that are ready, and cost no more Python than those of a plain model. It masks and casts the weights'
gradients when all are there.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rtk.nn._masked import Paths, capturing
from rtk.nn._trace import harmless
from rtk.nn.masked_conv2d import MaskedConv2d, PreparedWeight
from rtk.ops import engine
from rtk.ops._conv_paths import CUDNN, PATHS, lists_of, reads_turned, whole_mask
from rtk.ops.fold_weights import FoldedLayer, FoldLayer, FoldPlan
from rtk.ops.prepare_weight import prepare_all_now


class _Plan:
    def __init__(self, layers: list[MaskedConv2d]) -> None:
        self.layers = layers
        self.masks = [layer.mask for layer in layers]
        self.weights = [layer.weight for layer in layers]
        self.fold = FoldPlan(
            [FoldLayer(weight, mask) for weight, mask in zip(self.weights, self.masks, strict=True)]
        )
        self._versions: list[int] = []

    def serves(self) -> bool:
        """Whether the layers still have the tensors that it was made for, as they were then."""
        same = all(
            layer._buffers.get("mask") is mask and layer._parameters["weight"] is weight
            for layer, mask, weight in zip(self.layers, self.masks, self.weights, strict=True)
        )
        return same and (not self.fold.moved or all(map(_serves, self.layers)))

    def run(self) -> None:
        folded = self.fold()
        versions = [t._version for t in (*self.weights, *self.masks)]
        if versions != self._versions:  # a backward that still waits for the old ones must fail
            torch.autograd.graph.increment_version([layer.weight for layer in folded])
            self._versions = versions
        leaves = [layer.weight for layer in folded]
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in self.weights):
            leaves = _Prepared.apply(self.masks, leaves, *self.weights)
        eager = self.weights[0].is_cuda and not capturing()
        paths = [layer._eager_paths_for if eager else layer._paths_for for layer in self.layers]
        every = self._lists(folded, paths)
        for layer, ready, leaf, taken, lists in zip(
            self.layers, folded, leaves, paths, every, strict=True
        ):
            # Past Module.__setattr__, which takes longer than all else here.
            layer.__dict__["_prepared"] = PreparedWeight(
                ready.weight, ready.turned, leaf, taken, lists
            )

    def forget(self) -> None:
        """Take from the layers what `run` gave them."""
        for layer in self.layers:
            layer.__dict__["_prepared"] = None

    def _lists(
        self, folded: list[FoldedLayer], paths: list[Paths]
    ) -> list[dict[tuple[str, bool], Tensor | None]]:
        """Make the lists of all layers, one call a path."""
        wanted: dict[str, dict[tuple[int, bool], Tensor]] = {path: {} for path in PATHS[1:]}
        for i, (layer, ready, taken) in enumerate(zip(self.layers, folded, paths, strict=True)):
            if all(each == CUDNN for each in taken.values()):
                continue
            ways = 1
            if torch.is_grad_enabled():
                ways = 3 if layer.weight.requires_grad else 2
            for way in range(ways):
                for path in {each[way] for each in taken.values()} - {"cudnn"}:
                    turned = reads_turned(path, way)
                    source = ready.turned if turned else ready.weight
                    if way == 2:  # the mask's lists serve the other ways too
                        source = whole_mask(layer.weight, layer.mask)
                    wanted[path][i, turned] = source
        lists: list[dict[tuple[str, bool], Tensor | None]] = [{} for _ in folded]
        for path, users in wanted.items():
            made = lists_of(path, list(users.values()))
            for (i, of), each in zip(users, made, strict=True):
                lists[i][path, of] = each
        return lists


class _Prepared(torch.autograd.Function):
    """From the masters to the prepared weights, which `ready` holds already."""

    @staticmethod
    def forward(
        ctx: Any, masks: list[Tensor], ready: list[Tensor], *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*masks)
        ctx.set_materialize_grads(False)
        leaves = tuple(weight.detach() for weight in ready)
        frozen = [new for new, old in zip(leaves, weights, strict=True) if not old.requires_grad]
        ctx.mark_non_differentiable(*frozen)
        return leaves

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        known = [(i, grad) for i, grad in enumerate(grads) if grad is not None]
        masks = [ctx.saved_tensors[i] for i, _ in known]
        masked: list[Tensor | None] = [None] * len(grads)
        results = prepare_all_now([grad for _, grad in known], masks, torch.float32, True)
        for (i, _), result in zip(known, results, strict=True):
            masked[i] = result
        return None, None, *masked


_plans: weakref.WeakKeyDictionary[nn.Module, _Plan] = weakref.WeakKeyDictionary()


def prepare_together(model: nn.Module) -> None:
    """From now on prepare the model's masked convolutions at the start of its forward.

    It is done on a GPU, under autocast to bf16, for fp32 weights in channels_last with a bool mask;
    other layers prepare their weights themselves.
    """
    if _before not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_before)
        model.register_forward_hook(_after, always_call=True)


def prepare_apart(model: nn.Module) -> None:
    """Undo `prepare_together`."""
    for hooks, ours in ((model._forward_pre_hooks, _before), (model._forward_hooks, _after)):
        for number in [number for number, hook in hooks.items() if hook is ours]:
            del hooks[number]
            model._forward_hooks_always_called.pop(number, None)
    _plans.pop(model, None)


@harmless
def _before(model: nn.Module, _: Any) -> None:
    if torch.compiler.is_compiling() or not _wanted():
        return
    plan = _plans.get(model)
    if plan is None or not plan.serves():
        layers = [m for m in model.modules() if type(m) is MaskedConv2d and _serves(m)]
        if not layers or capturing():
            return
        plan = _plans[model] = _Plan(layers)
    if not (capturing() and plan.fold.moved):
        plan.run()


@harmless
def _after(model: nn.Module, *_: Any) -> None:
    if torch.compiler.is_compiling():
        return
    plan = _plans.get(model)
    if plan is not None:
        plan.forget()


def _wanted() -> bool:
    return (
        engine.is_on()
        and torch.is_autocast_enabled("cuda")
        and torch.get_autocast_dtype("cuda") == torch.bfloat16
        and not torch._C._are_functorch_transforms_active()
    )


def _serves(layer: MaskedConv2d) -> bool:
    weight, mask = layer.weight, layer.mask
    return (
        type(weight) is nn.Parameter
        and weight.is_cuda
        and (weight.dtype, mask.dtype) == (torch.float32, torch.bool)
        and mask.device == weight.device
        and weight.numel() > 0
        and weight.is_contiguous(memory_format=torch.channels_last)
        and not isinstance(layer.padding, str)
    )
