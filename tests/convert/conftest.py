"""Networks in the peers' formats, written here as the peers write them."""

import pytest
import torch
from torch import nn

from rtk import convert
from rtk.config import ConvertConfig
from rtk.models import ModelSpec, create
from rtk.ticket import TICKET, Ticket
from rtk.train import Checkpoint

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Peer:
    """A peer's network under torchvision's keys, and what it answers."""

    def __init__(self, stem="7x7", classes=7, arch="resnet18", width=0.125):
        # Normalised by 0 and 1, so that it is a network without a normaliser, as the peers' are.
        spec = ModelSpec(arch, stem, width, classes, (0.0,) * 3, (1.0,) * 3)
        self.network = create(spec)
        for module in self.network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.1, 0.1)
                nn.init.uniform_(module.running_var, 0.9, 1.1)
        self.network.eval()

    @property
    def state(self):
        return {name: tensor.clone() for name, tensor in self.network.state_dict().items()}

    def answer(self, x, mean=MEAN, std=STD):
        normalised = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        with torch.no_grad():
            return self.network(normalised)


@pytest.fixture
def peer():
    return Peer()


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 32, 32)


@pytest.fixture
def converted(tmp_path):
    """Convert a file, or what torch.save makes of a value, and return the checkpoint."""

    def run(content, name="file.pth", **settings):
        path = tmp_path / name
        if content is not None:
            path.parent.mkdir(exist_ok=True)
            torch.save(content, path)
        out = tmp_path / "converted"
        convert.run(ConvertConfig(out=str(out), file=str(path), **settings))
        return Checkpoint.load(out)

    return run


@pytest.fixture
def ticket(tmp_path):
    return lambda: Ticket.load(tmp_path / "converted" / TICKET)


def prefixed(prefix, state):
    return {prefix + key: tensor for key, tensor in state.items()}
