"""ResNet-18 and -50 (He et al. 2016) with torchvision's blocks, keys, shapes and start."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models import resnet as torchvision_resnet

from rtk.errors import RtkError
from rtk.models.base import MODELS, Classifier
from rtk.models.spec import ModelSpec
from rtk.nn import BatchNormAct2d, MaxPool2d

_PLANES = (64, 128, 256, 512)


def scaled(channels: int, width: float) -> int:
    """Return channels * width rounded to the nearest multiple of 8, at least 8."""
    return max(8, int(channels * width / 8 + 0.5) * 8)


class BasicBlock(torchvision_resnet.BasicBlock):
    """torchvision's, with what follows a convolution in one operator; its `relu` is not called."""

    bn1: BatchNormAct2d
    bn2: BatchNormAct2d

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output (N, planes, H / stride, W / stride), after the ReLU."""
        out = self.bn1(self.conv1(x), relu=True)
        out = self.conv2(out)
        identity = x if self.downsample is None else self.downsample(x)
        return self.bn2(out, identity, relu=True)


class Bottleneck(torchvision_resnet.Bottleneck):
    """torchvision's, with what follows a convolution in one operator; its `relu` is not called."""

    bn1: BatchNormAct2d
    bn2: BatchNormAct2d
    bn3: BatchNormAct2d

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output (N, 4 planes, H / stride, W / stride), after the ReLU."""
        out = self.bn1(self.conv1(x), relu=True)
        out = self.bn2(self.conv2(out), relu=True)
        out = self.conv3(out)
        identity = x if self.downsample is None else self.downsample(x)
        return self.bn3(out, identity, relu=True)


class ResNet(Classifier):
    """A residual network whose state dict is torchvision's, key by key and in order.

    Args:
        spec: stem "7x7" is torchvision's (stride 2, max-pool); "3x3" has stride 1 and no
            max-pool, for images of some 32 pixels. width scales every layer but the head's output.
        block: BasicBlock or Bottleneck.
        depths: blocks of each of the four layers.

    Raises:
        RtkError: where the width would leave every layer at the floor of 8 channels.
    """

    def __init__(
        self,
        spec: ModelSpec,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
    ) -> None:
        super().__init__(spec)
        if _PLANES[-1] * spec.width < 8:
            raise RtkError(
                f"{spec.arch}: width {spec.width:g} is so small that every layer would have the "
                f"least number of channels, 8; use at least {8 / _PLANES[-1]:g}"
            )
        planes = [scaled(channels, spec.width) for channels in _PLANES]
        self._inplanes = planes[0]
        # In torchvision's order: another one would change the order of the keys and, under a
        # given seed, the random start.
        if spec.stem == "7x7":
            self.conv1 = nn.Conv2d(3, planes[0], 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = nn.Conv2d(3, planes[0], 3, stride=1, padding=1, bias=False)
        self.bn1 = BatchNormAct2d(planes[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = MaxPool2d(3, stride=2, padding=1) if spec.stem == "7x7" else nn.Identity()
        self.layer1 = self._layer(block, planes[0], depths[0], stride=1)
        self.layer2 = self._layer(block, planes[1], depths[1], stride=2)
        self.layer3 = self._layer(block, planes[2], depths[2], stride=2)
        self.layer4 = self._layer(block, planes[3], depths[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(planes[3] * block.expansion, spec.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _layer(
        self, block: type[BasicBlock] | type[Bottleneck], planes: int, depth: int, stride: int
    ) -> nn.Sequential:
        out = planes * block.expansion
        downsample = None
        if stride != 1 or self._inplanes != out:
            downsample = nn.Sequential(
                nn.Conv2d(self._inplanes, out, 1, stride=stride, bias=False), BatchNormAct2d(out)
            )
        blocks = [
            block(self._inplanes, planes, stride, downsample, norm_layer=BatchNormAct2d),
            *(block(out, planes, norm_layer=BatchNormAct2d) for _ in range(depth - 1)),
        ]
        self._inplanes = out
        return nn.Sequential(*blocks)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the pooled features (N, F) of images (N, 3, H, W), float in [0, 1]."""
        x = self.maxpool(self.bn1(self.conv1(self.normalise(x)), relu=True))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.avgpool(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, num_classes) of images (N, 3, H, W), float in [0, 1]."""
        return self.fc(self.forward_features(x))


@MODELS.register("resnet18")
def resnet18(spec: ModelSpec) -> ResNet:
    """Return a ResNet-18: two basic blocks a layer, 11.7 M weights at width 1."""
    return ResNet(spec, BasicBlock, (2, 2, 2, 2))


@MODELS.register("resnet50")
def resnet50(spec: ModelSpec) -> ResNet:
    """Return a ResNet-50: 3, 4, 6, 3 bottleneck blocks, 25.6 M weights at width 1."""
    return ResNet(spec, Bottleneck, (3, 4, 6, 3))
