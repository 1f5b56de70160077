import pytest
import torch

from rtk import models
from rtk.config import TrainConfig
from rtk.data import Batches, Split

SPEC = models.ModelSpec("resnet18", "3x3", 0.0625, 3, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


@pytest.fixture(autouse=True)
def _one_cpu_thread(one_cpu_thread):
    with one_cpu_thread():
        yield


@pytest.fixture
def make_model():
    """Return a function that makes the same narrow ResNet-18 each time it is called."""

    def make():
        torch.manual_seed(0)
        return models.create(SPEC)

    return make


@pytest.fixture
def split():
    """24 random images of 8x8 pixels of three classes."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (24, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return Split(images, torch.arange(24) % 3)


@pytest.fixture
def batches(split):
    """Three steps of eight images an epoch."""
    return Batches(split, 8, augment="crop", shuffle=True, seed=3)


@pytest.fixture
def config():
    return TrainConfig(epochs=3, batch_size=8, lr=0.05, schedule="cosine", warmup_epochs=1)
