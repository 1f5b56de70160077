import random

import numpy as np
import pytest
import torch

from rtk.config import TrainConfig
from rtk.errors import RtkError
from rtk.train import resolve_arithmetic, resolve_device, seed_everything


def test_cpu_is_always_there():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cpu:"])
def test_a_name_torch_does_not_know_is_refused(name):
    with pytest.raises(RtkError, match=r"expected auto, cpu, cuda or cuda:N"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["meta", "mps"])
def test_devices_rtk_does_not_run_on_are_refused(name):
    with pytest.raises(RtkError, match=f"device '{name}' is not supported"):
        resolve_device(name)


def test_a_gpu_that_is_not_there_is_refused():
    count = torch.cuda.device_count()
    with pytest.raises(RtkError, match=f"torch sees {count} GPUs; use --device cpu.*rtk doctor"):
        resolve_device(f"cuda:{count}")


def test_seeding_fixes_all_three_generators():
    def draw(seed):
        seed_everything(seed)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw(4) == draw(4)
    assert all(a != b for a, b in zip(draw(4), draw(5), strict=True))


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("cpu", {}, (False, None)),
        ("cuda", {}, (True, torch.bfloat16)),
        ("cpu", {"amp": "bf16", "channels_last": "yes"}, (True, torch.bfloat16)),
        ("cuda", {"amp": "none", "channels_last": "no"}, (False, None)),
    ],
    ids=["cpu-auto", "cuda-auto", "cpu-forced", "cuda-off"],
)
def test_arithmetic_is_automatic_by_device(kind, settings, expected):
    assert resolve_arithmetic(TrainConfig(**settings), torch.device(kind)) == expected
