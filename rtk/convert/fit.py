"""From foreign tensors to one of rtk's networks that holds them, key by key."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from rtk import models
from rtk.config import ConvertConfig
from rtk.convert.formats import Foreign, State, Triple
from rtk.errors import RtkError
from rtk.models import Classifier, ModelSpec
from rtk.train.checkpoint import load_state

IMAGENET: tuple[Triple, Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR10: tuple[Triple, Triple] = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.201))
_HALF: tuple[Triple, Triple] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

# Blocks a layer, and whether they are bottlenecks.
_RESNETS = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}


def find_arch(state: State, told: str | None, config: ConvertConfig) -> str:
    """Return the architecture's full name: asked for, a ResNet by its blocks, or the file's word.

    Raises:
        RtkError: for an unknown name, or where nothing tells.
    """
    if config.arch is not None:
        if config.format == "timm" and ":" not in config.arch:
            return models.resolve_arch(f"timm:{config.arch}")
        return models.resolve_arch(config.arch)
    if (resnet := _resnet(state)) is not None:
        return models.resolve_arch(resnet)
    if told:
        for name in (told, told.lower(), told.lower().removeprefix("c")):  # cResNet34 (RST)
            try:
                return models.resolve_arch(name)
            except RtkError:  # it is a name of the author's own
                continue
    some = ", ".join(list(state)[:4])
    raise RtkError(
        f"{config.file} does not say which network it is of, and it is no plain ResNet (its first "
        f"tensors are {some}); name it with --arch, e.g. --arch torchvision:mobilenet_v2"
    )


def _resnet(state: State) -> str | None:
    blocks = {m.groups() for m in (re.match(r"layer([1-4])\.(\d+)\.", key) for key in state) if m}
    depths = tuple(sum(layer == at for layer, _ in blocks) for at in "1234")
    stem, first = state.get("conv1.weight"), state.get("layer1.0.conv1.weight")
    if stem is None or first is None or stem.dim() != 4 or stem.shape[0] != first.shape[0]:
        return None  # wide ResNets and ResNeXts are wider in the middle of a block
    return _RESNETS.get((depths, "layer1.0.conv3.weight" in state))


def fit(foreign: Foreign, arch: str, config: ConvertConfig) -> Classifier:
    """Return the network `arch` with the foreign tensors in it; what had to be done is noted.

    The head is the checkpoint's, of as many classes as it has.

    Raises:
        RtkError: listing every key that is missing, unexpected or of another shape, or for
            weights that are not finite.
    """
    state = foreign.state
    model = models.create(_spec(state, arch))
    head = state.get(f"{model.head_name}.weight")
    if head is not None and head.dim() in (2, 4) and len(head) != model.spec.num_classes:
        models.replace_head(model, len(head))
    _complete(model, foreign)
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise RtkError(
                f"{config.file}: {name} holds NaN or infinity; it is of a training that diverged"
            )
    load_state(model, state, f"{config.file}, read as {arch},")
    model.follow(_normalised(model, foreign, config))
    return model


def _spec(state: State, arch: str) -> ModelSpec:
    """Return what the tensors say of stem and width; the rest is filled in later."""
    stem, width = "own", 1.0
    if not models.is_from_library(arch):
        stem, first = "7x7", state.get("conv1.weight")
        if first is not None and first.dim() == 4:
            stem, width = "3x3" if first.shape[-1] == 3 else "7x7", len(first) / 64
    return ModelSpec(arch, stem, width, 1000, *IMAGENET)


def _complete(model: Classifier, foreign: Foreign) -> None:
    """Bring keys and shapes that mean the same into the model's form, in place."""
    state, own = foreign.state, model.state_dict()
    for name, tensor in state.items():
        wanted = own.get(name)
        if wanted is not None and tensor.dim() == 4 and tensor.shape == (*wanted.shape, 1, 1):
            state[name] = tensor.flatten(1)
            foreign.notes.append(f"{name}, a 1x1 convolution there, is a linear layer")
    plain = []
    for name in own.keys() - state.keys():
        layer, _, of = name.rpartition(".")
        normalises = f"{layer}.running_mean" in state
        if of == "num_batches_tracked" and normalises:
            state[name] = torch.zeros_like(own[name])  # files of before torch 0.4.1 have none
        elif of in ("weight", "bias") and normalises:
            state[name] = torch.full_like(own[name], float(of == "weight"))
            plain.append(layer)
        elif name == f"{model.head_name}.bias" and f"{model.head_name}.weight" in state:
            state[name] = torch.zeros_like(own[name])
            foreign.notes.append(f"{name} is 0: the file has none")
    if plain:
        foreign.notes.append("batch norm scales by 1 and shifts by 0: the file has neither")


def _normalised(model: Classifier, foreign: Foreign, config: ConvertConfig) -> ModelSpec:
    """Return the model's spec with the normaliser: asked for, the file's, or what is usual."""
    spec = model.spec
    mean: tuple[float, ...]
    std: tuple[float, ...]
    if config.mean is not None and config.std is not None:
        mean, std, said = config.mean, config.std, "as asked for"
    elif foreign.mean is not None and foreign.std is not None:
        mean, std, said = foreign.mean, foreign.std, "the file's"
    else:
        (mean, std), whose = _usual(model)
        said = f"{whose}, as the file has none (--mean and --std say otherwise)"
    foreign.notes.append(f"normaliser: mean {mean}, std {std}, {said}")
    return ModelSpec.from_dict({**spec.to_dict(), "mean": mean, "std": std})


def _usual(model: Classifier) -> tuple[tuple[Triple, Triple], str]:
    told: Any = getattr(model, "default_cfg", None)  # timm's
    if told and "mean" in told:
        return (tuple(told["mean"]), tuple(told["std"])), "timm's for this model"
    if model.spec.arch in ("torchvision:googlenet", "torchvision:inception_v3"):
        return _HALF, "that of the published weights"
    if model.spec.stem == "3x3":
        return CIFAR10, "CIFAR-10's, as the stem is 3x3"
    return IMAGENET, "ImageNet's"


def apply_head_mask(model: Classifier, foreign: Foreign) -> None:
    """Apply the head's mask to the head: tickets leave it out, as a task brings its own head."""
    mask = foreign.masks.pop(model.head_name, None)
    if mask is not None:
        head = model.get_submodule(model.head_name)
        assert isinstance(head, nn.Linear)
        with torch.no_grad():
            head.weight.mul_(mask.flatten(1))
        foreign.notes.append(f"the mask of {model.head_name}, the head, is applied to it")
