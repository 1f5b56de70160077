"""Layers with masked weights, and the way to and from plain models."""

from rtk.nn.batch_norm_act import BatchNormAct2d
from rtk.nn.convert import fold, mask_model
from rtk.nn.masked_conv2d import MaskedConv2d
from rtk.nn.masked_linear import MaskedLinear

__all__ = ["BatchNormAct2d", "MaskedConv2d", "MaskedLinear", "fold", "mask_model"]
