"""Layers with masked weights, and the way to and from plain models."""

from rtk.nn._compaction import CompactionReport
from rtk.nn.batch_norm_act import BatchNormAct2d
from rtk.nn.compact import compact
from rtk.nn.convert import fold, mask_model
from rtk.nn.fuse import FusedModel, fuse
from rtk.nn.masked_conv2d import MaskedConv2d
from rtk.nn.masked_linear import MaskedLinear
from rtk.nn.max_pool2d import MaxPool2d
from rtk.nn.tune import LayerTimes, tune

__all__ = [
    "BatchNormAct2d",
    "CompactionReport",
    "FusedModel",
    "LayerTimes",
    "MaskedConv2d",
    "MaskedLinear",
    "MaxPool2d",
    "compact",
    "fold",
    "fuse",
    "mask_model",
    "tune",
]
