"""Networks: torchvision's ResNets by key and shape, with their stem, width and normalisation.

A new model is one file with one `@MODELS.register(...)`, imported here.
"""

from rtk.models.base import MODELS, Classifier, create, replace_head
from rtk.models.resnet import ResNet
from rtk.models.spec import ModelSpec, resolve_stem

__all__ = [
    "MODELS",
    "Classifier",
    "ModelSpec",
    "ResNet",
    "create",
    "replace_head",
    "resolve_stem",
]
