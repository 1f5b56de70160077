import pytest
import torch
import torch.nn.functional as F

from rtk import models
from rtk.config import DataConfig
from rtk.data import Batches, load
from rtk.train import make_step


@pytest.fixture(autouse=True)
def _one_cpu_thread(request, one_cpu_thread):
    if request.node.get_closest_marker("gpu"):  # it hides the GPU
        yield
        return
    with one_cpu_thread():
        yield


@pytest.fixture
def batch():
    """(12, 3, 8, 8) images in [0, 1] and labels of four classes."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(12, 3, 8, 8, generator=generator)
    return x, torch.arange(12) % 4


@pytest.fixture
def model(batch):
    """A narrow ResNet-18 in eval mode whose batch norm has seen images."""
    torch.manual_seed(0)
    spec = models.ModelSpec("resnet18", "3x3", 0.125, 4, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    model = models.create(spec).train()
    with torch.no_grad():
        for _ in range(5):
            model(batch[0])
    return model.eval()


@pytest.fixture(scope="session")
def trained(one_cpu_thread):
    """A model that tells five digits apart, in eval mode, and (64, 3, 8, 8) test images of them."""
    dataset = load(DataConfig("digits[0-4]"))
    torch.manual_seed(0)
    spec = models.ModelSpec("resnet18", "3x3", 0.125, 5, (0.3,) * 3, (0.4,) * 3)
    with one_cpu_thread():
        model = models.create(spec).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        step = make_step(model, optimizer, amp=None, graph=False)
        batches = Batches(dataset.train, 32, shuffle=True, drop_last=True)
        for epoch in range(3):
            for x, y in batches.epoch(epoch):
                step(x, y)
        x, y = next(Batches(dataset.test, 64).epoch(0))
    return model.eval(), x, y


@pytest.fixture
def losses():
    """Return each image's cross-entropy in eval mode."""

    def measure(model, x, y):
        with torch.no_grad():
            return F.cross_entropy(model(x), y, reduction="none")

    return measure


@pytest.fixture
def wrong():
    """Return which images are misclassified."""

    def measure(model, x, y):
        with torch.no_grad():
            return model(x).argmax(1) != y

    return measure
