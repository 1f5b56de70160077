"""Segmentation networks on rtk's ResNets: DeepLabV3+ and FCN, with torchvision's heads.

N C H W: images. State-dict keys, as torchvision's segmentation models name them:

    backbone.*    the ResNet's own keys without its head: backbone.conv1.weight, ...
    classifier.*  FCN: torchvision's FCNHead. DeepLabV3+: classifier.aspp.* (torchvision's ASPP),
                  classifier.reduce.*, classifier.fuse.*, classifier.logits.*
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.models.segmentation.fcn import FCNHead

from rtk.config import SEGMENTATION_NETWORKS
from rtk.errors import RtkError, check_choice
from rtk.models.base import Classifier
from rtk.models.resnet import ResNet, scaled
from rtk.models.spec import ModelSpec

_STRIDES = {"7x7": (16, 8, 32), "3x3": (4, 2, 8)}  # by stem: one layer dilated, two, none
_RATES = (6, 12, 18)  # of the ASPP at the first of them


@dataclass(frozen=True)
class SegmentationSpec(ModelSpec):
    """A segmentation network: `arch`, `stem` and `width` are its backbone's.

    Args:
        network: deeplabv3plus or fcn.
        output_stride: pixels of the image between two of the last features: 16, 8 or 32 with the
            7x7 stem, 4, 2 or 8 with the 3x3 stem. None is the first of them, which dilates the
            last layer instead of striding.

    Raises:
        RtkError: where a value is out of its range.
    """

    network: str = "deeplabv3plus"
    output_stride: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("segmentation network", self.network, SEGMENTATION_NETWORKS)
        strides = _STRIDES.get(self.stem)
        if strides is None:
            raise RtkError(
                f"{self.network} needs a ResNet of rtk's own as its backbone, got {self.arch}; "
                "pretrain resnet18 or resnet50"
            )
        stride = strides[0] if self.output_stride is None else self.output_stride
        if stride not in strides:
            raise RtkError(
                f"output_stride: expected {', '.join(map(str, strides))} with the {self.stem} "
                f"stem, got {stride!r}"
            )
        object.__setattr__(self, "output_stride", stride)

    @property
    def backbone(self) -> ModelSpec:
        """The classification network that the backbone is the features of."""
        names = [field.name for field in dataclasses.fields(ModelSpec)]
        return ModelSpec(**{name: getattr(self, name) for name in names})


def read_spec(values: dict[str, Any]) -> ModelSpec:
    """Return the spec of a network of either kind out of what its `to_dict` gave."""
    kind = SegmentationSpec if "network" in values else ModelSpec
    return kind.from_dict(values)


class SegmentationNetwork(Classifier):
    """A network that gives every pixel logits; images are in [0, 1] and normalised inside.

    A ticket masks the backbone only; the head, `classifier`, is dense.

    Args:
        spec: of the whole network.
        backbone: becomes part of the network: it loses its head, and its last layers their strides.

    Raises:
        RtkError: where the backbone is no ResNet of rtk's.
    """

    head_name = "classifier"

    def __init__(self, spec: SegmentationSpec, backbone: Classifier) -> None:
        super().__init__(spec)
        if not isinstance(backbone, ResNet):
            raise RtkError(
                f"{spec.network} needs a ResNet of rtk's own as its backbone, got "
                f"{type(backbone).__name__}; pretrain resnet18 or resnet50"
            )
        high = backbone.fc.in_features
        reads_low = backbone.layer2.get_submodule("0.conv1")
        assert isinstance(reads_low, nn.Conv2d)
        low = reads_low.in_channels
        del backbone.fc
        self.backbone = backbone
        strides = _STRIDES[spec.stem]
        dilate(backbone, strides[-1] // int(spec.output_stride or strides[0]))
        if spec.network == "fcn":
            self.classifier: nn.Module = FCNHead(high, spec.num_classes)
        else:
            scale = strides[0] / int(spec.output_stride or strides[0])
            rates = [max(1, round(rate * scale)) for rate in _RATES]
            self.classifier = DeepLabV3PlusHead(low, high, spec.num_classes, rates, spec.width)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the backbone's pooled features (N, F) of images (N, 3, H, W), float in [0, 1]."""
        return self.backbone.forward_features(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, num_classes, H, W), fp32 or wider, of images (N, 3, H, W).

        Args:
            x: float in [0, 1], of any height and width.
        """
        net = self.backbone
        low = net.layer1(net.maxpool(net.bn1(net.conv1(self.normalise(x)), relu=True)))
        high = net.layer4(net.layer3(net.layer2(low)))
        if isinstance(self.classifier, DeepLabV3PlusHead):
            logits = self.classifier(low, high)
        else:
            logits = self.classifier(high)
        # Resized in fp32, whatever autocast made of them.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return _resize(logits, x)


class DeepLabV3PlusHead(nn.Module):
    """Atrous spatial pyramid pooling, then a decoder that looks at early features too.

    As CV_LTH_Pre-training used it, after VainF/DeepLabV3Plus-Pytorch: DeepLabV3+ (Chen et al. 2018)
    with one 3x3 convolution behind the concatenation, and Kaiming-normal weights. Channels, 256 and
    48 at width 1, follow the backbone's width.

    Args:
        low: channels of the early features (layer1).
        high: channels of the last features (layer4).
        num_classes: outputs.
        rates: dilations of the pyramid.
        width: of the backbone.
    """

    def __init__(
        self, low: int, high: int, num_classes: int, rates: list[int], width: float
    ) -> None:
        super().__init__()
        channels, reduced = scaled(256, width), scaled(48, width)
        self.aspp = ASPP(high, rates, channels)
        dropout = self.aspp.project[-1]
        assert isinstance(dropout, nn.Dropout)
        dropout.p = 0.1  # theirs; torchvision has 0.5
        self.reduce = _convolution(low, reduced, 1)
        self.fuse = _convolution(channels + reduced, channels, 3)
        self.logits = nn.Conv2d(channels, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """Return logits (N, num_classes, h, w) of features (N, low, h, w) and (N, high, ...)."""
        early = self.reduce(low)
        late = _resize(self.aspp(high), early)
        return self.logits(self.fuse(torch.cat([late, early], 1)))


def dilate(backbone: ResNet, factor: int) -> None:
    """Take the strides out of the last layers, in place, and dilate what comes behind them.

    The features at every `factor`-th place stay exactly what they were (the a trous algorithm);
    those in between are new.

    Args:
        backbone: a network as built.
        factor: 1, 2 (of layer4) or 4 (of layer3 and layer4): how much denser the features get.
    """
    layers = {1: [], 2: [backbone.layer4], 4: [backbone.layer3, backbone.layer4]}[factor]
    dilation = 1
    for layer in layers:
        behind = 2 * dilation
        for module in layer.modules():
            if not isinstance(module, nn.Conv2d):
                continue
            strided = module.stride == (2, 2)
            if module.kernel_size == (3, 3):
                rate = dilation if strided else behind
                module.dilation = module.padding = (rate, rate)
            if strided:
                module.stride = (1, 1)
        dilation = behind


def _convolution(inputs: int, outputs: int, size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)
