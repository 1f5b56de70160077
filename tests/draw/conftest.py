import pytest

from rtk import pretrain
from rtk.config import DataConfig, ModelConfig, PretrainConfig, TrainConfig


@pytest.fixture(autouse=True)
def _one_cpu_thread(one_cpu_thread_unless_gpu):
    pass


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory, one_cpu_thread):
    """The folder of a finished pretraining run: a narrow ResNet-18 at its random start."""
    folder = tmp_path_factory.mktemp("pretrained")
    config = PretrainConfig(
        out=str(folder),
        data=DataConfig("digits[0-1]"),
        model=ModelConfig(width=0.125),
        train=TrainConfig(epochs=0),
    )
    with one_cpu_thread():
        pretrain.run(config)
    return folder
