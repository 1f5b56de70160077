"""mask_model and fold: between a plain model and one with masked layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from rtk.errors import RtkError, did_you_mean
from rtk.nn._masked import MaskedLayer
from rtk.nn._prepare import prepare_apart, prepare_together
from rtk.nn.masked_conv2d import MaskedConv2d
from rtk.nn.masked_linear import MaskedLinear
from rtk.ops._layout import memory_format

if TYPE_CHECKING:
    from rtk.ticket import Ticket


def _swap(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put `new`'s values where its keys were, under every name of a module that has several."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in new:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new[module])


_REPLACED_FORWARDS = {layer.forward for layer in (nn.Conv2d, nn.Linear, MaskedConv2d, MaskedLinear)}


def mask_model(model: nn.Module, ticket: Ticket) -> nn.Module:
    """Swap the layers that `ticket` prunes for masked ones, in place, and return `model`.

    Every other module and every state_dict key stays; the parameters are the same objects, so an
    optimiser made before goes on working. A layer that is masked already gets the new mask.

    Raises:
        RtkError: if the model lacks a layer of the ticket, or a mask does not fit its weight;
            then nothing has been changed.
    """
    modules = check_fits(model, ticket)
    new: dict[nn.Module, nn.Module] = {}
    for name, mask in ticket.masks.items():
        module = modules[name]
        if isinstance(module, MaskedLayer):
            module.set_mask(_laid_out(mask, module.weight))
        elif isinstance(module, nn.Conv2d):
            new[module] = MaskedConv2d.from_conv(module, _laid_out(mask, module.weight))
        else:
            assert isinstance(module, nn.Linear)
            new[module] = MaskedLinear.from_linear(module, mask.clone())
    _swap(model, new)
    prepare_together(model)
    return model


def check_fits(model: nn.Module, ticket: Ticket) -> dict[str, nn.Module]:
    """Return the modules of `model` by all their names, if `ticket` fits them.

    Raises:
        RtkError: if the model lacks a layer of the ticket, one is not a plain or masked Conv2d or
            Linear with a weight of its own, or a mask does not fit its weight.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, mask in ticket.masks.items():
        module = modules.get(name)
        if not isinstance(module, nn.Conv2d | nn.Linear):
            raise RtkError(
                f"the ticket masks layer {name!r}, which the model has not as a Conv2d or Linear"
                f"{did_you_mean(name, modules)}; is the ticket for another architecture?"
            )
        if type(module).forward not in _REPLACED_FORWARDS:
            raise RtkError(
                f"layer {name!r} is a {type(module).__name__} with a forward of its own, which a "
                "masked layer would replace; swap it for a plain Conv2d or Linear first"
            )
        if not isinstance(module.weight, nn.Parameter):
            raise RtkError(
                f"the weight of {name!r} is computed from others (torch.nn.utils.prune or a "
                "parametrization); make that permanent first, e.g. with prune.remove"
            )
        if not _fits(mask.shape, module.weight.shape):
            raise RtkError(
                f"the ticket's mask for {name!r} is {tuple(mask.shape)}, the model's weight "
                f"{tuple(module.weight.shape)}; is the ticket for another architecture or width?"
            )
    return modules


def _laid_out(mask: Tensor, weight: Tensor) -> Tensor:
    """Return a copy in the weight's memory format, in which the kernels read both fastest."""
    return mask.clone(memory_format=memory_format(weight))


def _fits(mask: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    return len(mask) == len(weight) and all(
        size in (1, wanted) for size, wanted in zip(mask, weight, strict=True)
    )


def fold(model: nn.Module) -> nn.Module:
    """Swap every masked layer of `model` for a plain one with the masked weight, in place.

    Returns `model`, or the folded layer where `model` is itself a masked layer.
    """
    if isinstance(model, MaskedConv2d | MaskedLinear):
        return model.fold()
    masked = [m for m in model.modules() if isinstance(m, MaskedConv2d | MaskedLinear)]
    _swap(model, {module: module.fold() for module in masked})
    prepare_apart(model)
    return model
