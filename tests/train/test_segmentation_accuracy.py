import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from rtk.data.segmentation import IGNORED, SegmentationSplit, WholeImages
from rtk.errors import RtkError
from rtk.train import segmentation_accuracy


class Colours(nn.Module):
    """Logits of 4 classes out of the colours; notes the mode it runs in."""

    def __init__(self, classes=4):
        super().__init__()
        self.layer = nn.Conv2d(3, classes, 1)
        self.norm = nn.BatchNorm2d(classes)
        self.modes = set()

    def forward(self, x):
        self.modes.add(self.training)
        return self.norm(self.layer(x))


def split(count=7, classes=4, ignored=0.3):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 6, 9), generator=generator, dtype=torch.uint8)
    masks = torch.randint(0, classes, (count, 6, 9), generator=generator).to(torch.uint8)
    masks[torch.rand(masks.shape, generator=generator) < ignored] = IGNORED
    return SegmentationSplit(images, masks)


@pytest.mark.parametrize("classes", [4, 3], ids=["all-classes", "one-never-in-a-mask"])
def test_it_is_torchmetrics(device, classes):
    torch.manual_seed(0)
    model, test = Colours().to(device), split(classes=classes)
    found = segmentation_accuracy(model, WholeImages(test, 3, device=device))
    with torch.no_grad():
        predicted = model.cpu().eval()(test.images / 255).argmax(1)
    masks = test.masks.long()
    jaccard = {"num_classes": 4, "ignore_index": 255}
    assert found.miou == pytest.approx(MulticlassJaccardIndex(**jaccard)(predicted, masks).item())
    each = MulticlassJaccardIndex(**jaccard, average="none")(predicted, masks).tolist()
    assert found.class_iou == pytest.approx(each)
    micro = MulticlassAccuracy(4, ignore_index=255, average="micro")(predicted, masks).item()
    assert found.pixel_accuracy == pytest.approx(micro)
    assert found.images == 7


def test_the_mean_is_over_the_classes_that_occur():
    model = Colours()
    nn.init.zeros_(model.layer.weight)
    with torch.no_grad():
        model.layer.bias.copy_(torch.tensor([9.0, 0.0, 0.0, 0.0]))  # every pixel is of class 0
    masks = torch.zeros(2, 4, 4).byte()
    masks[0, :2] = 1  # 8 of 32 pixels
    masks[1, 3] = IGNORED  # 4 of them
    test = SegmentationSplit(torch.zeros(2, 3, 4, 4).byte(), masks)
    found = segmentation_accuracy(model, WholeImages(test, 1))
    assert found.class_iou == (20 / 28, 0.0, None, None)
    assert found.miou == pytest.approx(10 / 28)
    assert found.pixel_accuracy == pytest.approx(20 / 28)


def test_it_looks_in_eval_mode_and_puts_every_mode_back():
    model = Colours().train()
    model.norm.eval()
    before = model.norm.running_mean.clone()
    segmentation_accuracy(model, WholeImages(split(), 3))
    assert model.modes == {False}
    assert (model.training, model.layer.training, model.norm.training) == (True, True, False)
    assert torch.equal(model.norm.running_mean, before)


def test_in_half_precision():
    torch.manual_seed(0)
    model = Colours()
    single = segmentation_accuracy(model, WholeImages(split(), 3))
    half = segmentation_accuracy(model.to(torch.bfloat16), WholeImages(split(), 3))
    assert half.pixel_accuracy == pytest.approx(single.pixel_accuracy, abs=0.05)


def test_a_class_the_model_has_not_is_refused():
    with pytest.raises(RtkError, match=r"label or a prediction outside 0\.\.2"):
        segmentation_accuracy(Colours(3), WholeImages(split(), 3))
