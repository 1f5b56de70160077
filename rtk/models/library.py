"""Networks of torchvision and timm: theirs to the last key, with rtk's normalisation inside.

The library builds the network, which then becomes an instance of a class that inherits from its
own and from `LibraryClassifier`. So layer names and state_dict keys are the library's: published
weights load, and a ticket drawn here applies to the plain network and the other way round.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, cast

import torchvision
from torch import Tensor, nn

from rtk.errors import RtkError, did_you_mean
from rtk.models.base import Classifier
from rtk.models.spec import ModelSpec

# Their auxiliary classifiers would change what forward returns while training.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


class LibraryClassifier(Classifier):
    """What a library's network gets: images in [0, 1], pooled features, a head by name.

    Never built itself: `build` makes a class of it and the network's own, `library_class`.
    """

    library_class: type[nn.Module]

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the features (N, F) that the head reads, of images (N, 3, H, W) in [0, 1]."""
        read: list[Tensor] = []
        head = self.get_submodule(self.head_name)
        hook = head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        try:
            self(x)
        finally:
            hook.remove()
        return read[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, num_classes) of images (N, 3, H, W), float in [0, 1]."""
        return self.library_class.forward(self, self.normalise(x))


class TimmClassifier(LibraryClassifier):
    """timm's networks have a `forward_features` too, unpooled, which their own forward calls."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, num_classes) of images (N, 3, H, W), float in [0, 1]."""
        theirs: Any = self.library_class
        return theirs.forward_head(self, theirs.forward_features(self, self.normalise(x)))


@functools.cache
def torchvision_names() -> tuple[str, ...]:
    """Return the names of torchvision's classification models."""
    return tuple(torchvision.models.list_models(module=torchvision.models))


def timm_has(name: str) -> bool:
    """Return whether timm is installed and has a model of that name (NAME or NAME.WEIGHTS)."""
    return importlib.util.find_spec("timm") is not None and _timm().is_model(name)


def check_known(arch: str) -> None:
    """Raise an RtkError where the library named in `arch`, e.g. timm:NAME, has no such model."""
    library, _, name = arch.partition(":")
    known = torchvision_names() if library == "torchvision" else _timm().list_models()
    if name not in known and not (library == "timm" and _timm().is_model(name)):
        raise RtkError(f"{library} has no model {name!r}{did_you_mean(name, known)}")


def build(spec: ModelSpec) -> Classifier:
    """Return the library's network that `spec.arch` names (in full), as a Classifier.

    Raises:
        RtkError: for a width other than 1, or a network that is not a plain classifier with a
            linear head.
    """
    library, _, name = spec.arch.partition(":")
    if spec.width != 1:
        raise RtkError(
            f"model width: expected 1 for {spec.arch}, got {spec.width:g}; the multiplier is of "
            "rtk's ResNets, other networks come in sizes of their own, by name"
        )
    make = _torchvision_network if library == "torchvision" else _timm_network
    mixin = LibraryClassifier if library == "torchvision" else TimmClassifier
    network = make(name, spec)
    head = _head_name(network, spec)
    for attribute in ("spec", "mean", "std", "normalise", "head_name"):
        assert not hasattr(network, attribute), f"{spec.arch} has an attribute {attribute!r}"
    network.__class__ = _joined(mixin, cast(Any, type(network)))
    classifier = cast(LibraryClassifier, network)
    classifier.head_name = head
    classifier.follow(spec)
    return classifier


@functools.cache
def _joined(mixin: type[LibraryClassifier], own: type[nn.Module]) -> type[nn.Module]:
    return type(own.__name__, (mixin, own), {"library_class": own, "__module__": __name__})


def _torchvision_network(name: str, spec: ModelSpec) -> nn.Module:
    make: Callable[..., nn.Module] = torchvision.models.get_model_builder(name)
    return make(weights=None, num_classes=spec.num_classes, **_ARGUMENTS.get(name, {}))


def _timm_network(name: str, spec: ModelSpec) -> nn.Module:
    network = _timm().create_model(name, pretrained=False, num_classes=spec.num_classes)
    # TimmClassifier does these two things in place of its forward.
    if {*type(network).forward.__code__.co_names} != {"forward_features", "forward_head"}:
        raise RtkError(
            f"{spec.arch} does more in its forward than features and a head; take another model "
            "of timm, or torchvision's of that name"
        )
    return network


def _head_name(network: Any, spec: ModelSpec) -> str:
    """Return the name of the classifier: a linear layer, timm's by its own word or the last."""
    linear = {m: n for n, m in network.named_modules() if isinstance(m, nn.Linear)}
    timms = hasattr(network, "get_classifier")
    head = network.get_classifier() if timms else next(reversed(linear), None)
    if head not in linear or head.out_features != spec.num_classes:
        raise RtkError(
            f"{spec.arch} does not end in one linear layer, which rtk needs as the head (it may "
            "have several heads, or a convolution); take another model"
        )
    return linear[head]


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise RtkError(
            "models named timm:NAME need timm, which is not installed: pip install 'rtk[timm]'"
        ) from error
    return timm
