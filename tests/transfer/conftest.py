import pytest

from rtk import draw, pretrain
from rtk.config import DataConfig, DrawConfig, ModelConfig, PretrainConfig, TrainConfig


@pytest.fixture(autouse=True)
def _one_cpu_thread(one_cpu_thread_unless_gpu):
    pass


@pytest.fixture(scope="session")
def make_pretrained(tmp_path_factory, one_cpu_thread):
    """Return a function that pretrains a ResNet (by default for no epoch) and gives its folder."""

    def make(epochs=0, **model):
        folder = tmp_path_factory.mktemp("pretrained")
        config = PretrainConfig(
            out=str(folder),
            data=DataConfig("digits[0-1]"),
            model=ModelConfig(**{"width": 0.0625, **model}),
            train=TrainConfig(epochs=epochs, batch_size=64, lr=0.05),
        )
        with one_cpu_thread():
            pretrain.run(config)
        return folder

    return make


@pytest.fixture(scope="session")
def pretrained(make_pretrained):
    return make_pretrained(epochs=1)


@pytest.fixture(scope="session")
def ticket(pretrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ticket")
    draw.run(DrawConfig(out=str(folder), checkpoint=str(pretrained), sparsity=0.8))
    return folder
