from contextlib import contextmanager

import pytest
import torch

from rtk import pretrain
from rtk.config import DataConfig, ModelConfig, PretrainConfig, TrainConfig


@contextmanager
def one_cpu_thread():
    """On models this small more threads, or a GPU, are slower; and on a GPU bits may differ."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _one_cpu_thread():
    with one_cpu_thread():
        yield


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
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
