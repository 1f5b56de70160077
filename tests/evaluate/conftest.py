import pytest

from rtk import draw, pretrain, transfer
from rtk.config import (
    DataConfig,
    DrawConfig,
    ModelConfig,
    PretrainConfig,
    TrainConfig,
    TransferConfig,
)


@pytest.fixture(autouse=True)
def _one_cpu_thread(one_cpu_thread_unless_gpu):
    pass


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory, one_cpu_thread):
    """A ResNet that can tell the digits 0 and 1 apart."""
    folder = tmp_path_factory.mktemp("pretrained")
    config = PretrainConfig(
        out=str(folder),
        seed=2,
        data=DataConfig("digits[0-1]"),
        model=ModelConfig(width=0.125),
        train=TrainConfig(epochs=3, batch_size=32, lr=0.05),
    )
    with one_cpu_thread():
        pretrain.run(config)
    return folder


@pytest.fixture(scope="session")
def transferred(pretrained, tmp_path_factory, one_cpu_thread):
    """The same, pruned and transferred to the digits 2 and 3."""
    ticket, folder = tmp_path_factory.mktemp("ticket"), tmp_path_factory.mktemp("transferred")
    config = TransferConfig(
        out=str(folder),
        seed=3,
        checkpoint=str(pretrained),
        ticket=str(ticket),
        data=DataConfig("digits[2-3]"),
        train=TrainConfig(epochs=2, batch_size=32, lr=0.05),
    )
    with one_cpu_thread():
        draw.run(DrawConfig(out=str(ticket), checkpoint=str(pretrained), granularity="row"))
        transfer.run(config)
    return folder
