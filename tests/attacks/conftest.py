import pytest
import torch

from rtk import models


@pytest.fixture(autouse=True)
def _one_cpu_thread(one_cpu_thread):
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
