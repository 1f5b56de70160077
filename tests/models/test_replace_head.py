import pytest
import torch
from torch import nn

from rtk.errors import RtkError
from rtk.models import ModelSpec, create, replace_head


@pytest.fixture
def model():
    return create(ModelSpec("resnet18", "3x3", 0.125, 10, (0.5,) * 3, (0.25,) * 3))


def test_the_head_is_new_and_the_rest_is_kept(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert replace_head(model, 7) is model
    after = model.state_dict()
    assert list(after) == list(before)
    assert after["fc.weight"].shape == (7, 64) and after["fc.bias"].shape == (7,)
    assert all(torch.equal(after[k], before[k]) for k in before if not k.startswith("fc."))
    assert model.spec.num_classes == 7 and model.spec.arch == "resnet18"
    assert model.eval()(torch.rand(2, 3, 8, 8)).shape == (2, 7)
    assert all(p.requires_grad and not p.is_meta for p in model.fc.parameters())


def test_the_start_is_nn_linears_own(model):
    torch.manual_seed(3)
    replace_head(model, 100)
    torch.manual_seed(3)
    plain = nn.Linear(64, 100)
    assert torch.equal(model.fc.weight, plain.weight)
    assert torch.equal(model.fc.bias, plain.bias)


def test_a_generator_reproduces_it_and_spares_the_global_state(model):
    state = torch.get_rng_state()
    heads = []
    for seed in (1, 1, 2):
        replace_head(model, 5, generator=torch.Generator().manual_seed(seed))
        heads.append(model.fc.weight.detach().clone())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_dtype_and_mode_are_kept(model):
    model = model.to(torch.bfloat16).eval()
    replace_head(model, 5)
    assert model.fc.weight.dtype == torch.bfloat16
    assert not model.fc.training


def test_errors(model):
    with pytest.raises(RtkError, match="num_classes of at least 1, got 0"):
        replace_head(model, 0)
    model.fc = nn.Identity()
    with pytest.raises(RtkError, match="fc is Identity, expected a linear layer"):
        replace_head(model, 5)
