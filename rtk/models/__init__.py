"""Networks: rtk's ResNets, and torchvision's and timm's by name, with normalisation inside.

rtk's are torchvision's by key and shape, with a choice of stem and width. A new model is one file
with one `@MODELS.register(...)`, imported here.
"""

from rtk.models.architectures import create, resolve_arch
from rtk.models.base import MODELS, Classifier, replace_head
from rtk.models.resnet import ResNet
from rtk.models.segmentation import SegmentationNetwork, SegmentationSpec, read_spec
from rtk.models.spec import ModelSpec, is_from_library, resolve_stem

__all__ = [
    "MODELS",
    "Classifier",
    "ModelSpec",
    "ResNet",
    "SegmentationNetwork",
    "SegmentationSpec",
    "create",
    "is_from_library",
    "read_spec",
    "replace_head",
    "resolve_arch",
    "resolve_stem",
]
