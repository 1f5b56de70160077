import pytest
import torch
from torch import nn

from rtk.attacks import PGD
from rtk.data import Batches, Split
from rtk.errors import RtkError
from rtk.train import Accuracy, accuracy


class FirstPixel(nn.Module):
    """Votes for the class that an image's first pixel names."""

    def __init__(self, classes):
        super().__init__()
        self.classes = classes
        self.dropout = nn.Dropout(0.99)

    def forward(self, x):
        predicted = (x[:, 0, 0, 0] * 255).round().long()
        return self.dropout(nn.functional.one_hot(predicted, self.classes).float() + 0.01)


def images_of(predicted, labels, batch_size=3):
    images = torch.zeros(len(labels), 3, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor(predicted, dtype=torch.uint8)
    return Batches(Split(images, torch.tensor(labels)), batch_size)


def test_top1_and_mean_per_class():
    # Class 0: 3 of 4, class 1: 0 of 1, class 3: 1 of 2; class 2 does not occur.
    batches = images_of([0, 0, 0, 1, 2, 3, 0], [0, 0, 0, 0, 1, 3, 3])
    found = accuracy(FirstPixel(4), batches)
    mean = pytest.approx((3 / 4 + 0 + 1 / 2) / 3)
    assert found == Accuracy(top1=4 / 7, mean_per_class=mean, images=7)


def test_both_are_torchmetrics():
    from torchmetrics.classification import MulticlassAccuracy

    labels = [0] * 9 + [1] * 4 + [2] * 2 + [3] * 5
    predicted = torch.randint(4, (20,)).tolist()
    found = accuracy(FirstPixel(4), images_of(predicted, labels))
    for average, value in (("micro", found.top1), ("macro", found.mean_per_class)):
        peer = MulticlassAccuracy(4, average=average)(torch.tensor(predicted), torch.tensor(labels))
        assert value == pytest.approx(peer.item(), abs=1e-6)
    assert found.top1 != pytest.approx(found.mean_per_class)


def test_the_attacks_images_are_measured():
    batches = images_of([0, 1], [0, 1])

    def attack(model, x, y):
        assert not model.training
        x = x.clone()
        x[:, 0, 0, 0] = (1 - y) / 255
        return x

    assert accuracy(FirstPixel(2), batches).top1 == 1.0
    assert accuracy(FirstPixel(2), batches, attack).top1 == 0.0


def test_each_modules_mode_comes_back(make_model, split):
    model = make_model().train()
    model.layer2.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accuracy(model, Batches(split, 10))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("attack", [None, PGD(steps=1)], ids=["natural", "attacked"])
def test_a_model_of_another_precision_is_measured(make_model, split, dtype, attack):
    model = make_model().to(dtype)
    found = accuracy(model, Batches(split, 10), attack)
    assert found.images == 24 and all(p.dtype == dtype for p in model.parameters())


def test_an_unknown_graph_is_refused(make_model, split):
    with pytest.raises(RtkError, match="graph must be 'auto', True or False, got 'never'"):
        accuracy(make_model(), Batches(split, 10), PGD(steps=1), graph="never")


@pytest.mark.parametrize("attacked", [False, True], ids=["natural", "attacked"])
def test_labels_without_a_class_are_refused(attacked):
    attack = (lambda model, x, y: x) if attacked else None
    with pytest.raises(RtkError, match=r"labels must be in \[0, 2\).*got 1 to 4"):
        accuracy(FirstPixel(2), images_of([0, 0], [1, 4]), attack)
