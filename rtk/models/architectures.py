"""From the name of an architecture to the network: rtk's own, torchvision's or timm's."""

from __future__ import annotations

import dataclasses

from rtk.errors import RtkError, did_you_mean
from rtk.models import library
from rtk.models.base import MODELS, Classifier
from rtk.models.segmentation import SegmentationNetwork, SegmentationSpec
from rtk.models.spec import ModelSpec, check_stem, is_from_library


def resolve_arch(name: str) -> str:
    """Return the full name of an architecture, which specs and tickets hold.

    A plain name is rtk's own network of that name, else torchvision's, else timm's where timm is
    installed: densenet121 is torchvision:densenet121, as it would be without timm.

    Raises:
        RtkError: for an unknown name, or a name of timm's without timm.
    """
    if name in MODELS.names():
        return name
    if is_from_library(name):
        library.check_known(name)
        return name
    if name in library.torchvision_names():
        return f"torchvision:{name}"
    if library.timm_has(name):
        return f"timm:{name}"
    known = [*MODELS.names(), *library.torchvision_names()]
    raise RtkError(
        f"unknown model {name!r}: expected one of {', '.join(MODELS.names())}, a model of "
        f"torchvision, e.g. densenet121, or timm:NAME for one of timm{did_you_mean(name, known)}"
    )


def create(spec: ModelSpec) -> Classifier:
    """Return a freshly initialised network, drawn from torch's global random state.

    Args:
        spec: architecture, stem, width, classes and normalisation. A library's network is built by
            the library, without downloading weights; a SegmentationSpec makes a
            SegmentationNetwork.

    Raises:
        RtkError: where the architecture is unknown or cannot have that stem or width, or is a
            library's without a linear head.
    """
    if isinstance(spec, SegmentationSpec):
        return SegmentationNetwork(spec, create(spec.backbone))
    arch = resolve_arch(spec.arch)
    check_stem(arch, spec.stem)
    spec = dataclasses.replace(spec, arch=arch)
    return library.build(spec) if is_from_library(arch) else MODELS.get(arch)(spec)
