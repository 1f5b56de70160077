import math

import pytest
import torch
from torch import nn

from rtk.config import TrainConfig
from rtk.errors import RtkError
from rtk.train import learning_rate, make_optimizer
from rtk.train.optim import match_layouts


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [(0, 0.4), (2.99, 0.4), (3, 0.04), (4.5, 0.04), (5, 0.004), (100, 0.004)],
)
def test_multistep_falls_at_its_milestones(epoch, rate):
    config = TrainConfig(lr=0.4, schedule="multistep", milestones=(3, 5), gamma=0.1)
    assert learning_rate(config, epoch) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(
    ("epoch", "share"),
    [(0, 1), (2.5, (1 + math.sqrt(0.5)) / 2), (5, 0.5), (7.5, (1 - math.sqrt(0.5)) / 2), (10, 0)],
)
def test_cosine_falls_to_zero_at_the_last_epoch(epoch, share):
    config = TrainConfig(epochs=10, lr=0.3, schedule="cosine")
    assert learning_rate(config, epoch) == pytest.approx(0.3 * share, abs=1e-12)


def test_constant_stays():
    config = TrainConfig(epochs=10, lr=0.3, schedule="constant", milestones=(1, 2))
    assert [learning_rate(config, e) for e in (0, 5, 9.9)] == [0.3] * 3


@pytest.mark.parametrize(("epoch", "share"), [(0, 0), (0.5, 0.25), (1, 0.5), (1.5, 0.75), (2, 1)])
def test_warm_up_rises_linearly_from_zero(epoch, share):
    config = TrainConfig(lr=0.2, schedule="constant", warmup_epochs=2)
    assert learning_rate(config, epoch) == pytest.approx(0.2 * share)


def test_warm_up_scales_the_schedule_below_it():
    config = TrainConfig(lr=1.0, schedule="multistep", milestones=(1,), gamma=0.1, warmup_epochs=2)
    assert learning_rate(config, 1.5) == pytest.approx(0.1 * 0.75)


def test_the_optimiser_is_sgd_over_what_is_trained():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    model[0].requires_grad_(False)
    config = TrainConfig(lr=0.3, momentum=0.8, weight_decay=0.02, nesterov=True)
    optimizer = make_optimizer(model.parameters(), config)
    assert isinstance(optimizer, torch.optim.SGD)
    (group,) = optimizer.param_groups
    assert group["params"] == [model[1].weight, model[1].bias]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.3, 0.8, 0.02)
    assert group["nesterov"] is True
    assert group["fused"] is None  # on a GPU only


def test_state_is_laid_out_as_its_parameters_are():
    model = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    momenta = {
        0: {"momentum_buffer": torch.randn(8, 3, 3, 3)},
        1: {"momentum_buffer": torch.randn(8)},
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": momenta})
    match_layouts(optimizer)
    for index, parameter in enumerate(model.parameters()):
        found = optimizer.state[parameter]["momentum_buffer"]
        assert found.stride() == parameter.stride() and not found.requires_grad
        assert torch.equal(found, momenta[index]["momentum_buffer"])


@pytest.mark.parametrize("schedule", ["multistep", "cosine", "constant"])
def test_every_schedule_of_the_configuration_is_known(schedule):
    assert learning_rate(TrainConfig(schedule=schedule), 0) == 0.1
    with pytest.raises(RtkError, match="did you mean"):
        TrainConfig(schedule=schedule + "s")
