"""MadryLab/robustness and robust-models-transfer: their AttackerModel, saved as they save it."""

import os

import dill
import pytest
import torch
from torch import nn

from rtk import convert
from rtk.config import ConvertConfig
from rtk.errors import RtkError
from rtk.train import Checkpoint

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class InputNormalize(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("new_mean", torch.tensor(MEAN)[..., None, None])
        self.register_buffer("new_std", torch.tensor(STD)[..., None, None])


class Attacker(nn.Module):
    def __init__(self, model, normalize):
        super().__init__()
        self.normalize = normalize
        self.model = model


class AttackerModel(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.normalizer = InputNormalize()
        self.model = model
        self.attacker = Attacker(model, self.normalizer)


class DummyModel(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model


def saved_state(network, wrapper=nn.Identity):
    model = network if wrapper is nn.Identity else wrapper(network)
    state = nn.DataParallel(AttackerModel(model)).state_dict()
    network.cpu()  # nn.DataParallel takes it to a GPU, where there is one
    return state


@pytest.mark.parametrize("wrapper", [nn.Identity, DummyModel], ids=["plain", "add_custom_forward"])
@pytest.mark.parametrize("entry", ["model", "state_dict"])
def test_the_network_its_normaliser_and_its_head(peer, pixels, converted, wrapper, entry):
    state = saved_state(peer.network, wrapper)
    assert "module.attacker.model" in " ".join(state)  # as their keys are
    checkpoint = converted({entry: state, "epoch": 90})
    model = checkpoint.build_model().eval()
    assert checkpoint.spec.mean == MEAN and checkpoint.spec.std == STD  # exactly
    assert checkpoint.spec.num_classes == 7 and checkpoint.spec.arch == "resnet18"
    assert torch.equal(model(pixels), peer.answer(pixels, MEAN, STD))
    assert checkpoint.meta["converted"]["format"] == "robustness"


def test_a_dill_file_is_opened_with_trust_only_and_in_another_process(
    peer, pixels, tmp_path, converted, capsys
):
    """Their learning rate schedule is a lambda, which dill saves: code. Here it does something."""
    trace = tmp_path / "executed"

    class Schedule:
        def __reduce__(self):
            return exec, (f"import os; open({str(trace)!r}, 'w').write(str(os.getpid()))",)

    path = tmp_path / "resnet18_l2_eps3.0.ckpt"
    state = saved_state(peer.network)
    content = {"model": state, "schedule": {"lr_lambdas": [lambda t: 0.1]}, "epoch": Schedule()}
    torch.save(content, path, pickle_module=dill)
    assert not trace.exists()

    with pytest.raises(RtkError) as error:
        converted(None, path.name)
    assert "can run any code that its author put in; it was not" in str(error.value)
    assert "--trust opens it, in a process of its own" in str(error.value)
    assert not trace.exists()

    checkpoint = converted(None, path.name, trust=True)
    assert trace.read_text() != str(os.getpid())
    assert torch.equal(checkpoint.build_model().eval()(pixels), peer.answer(pixels, MEAN, STD))
    assert checkpoint.lineage["pretrain"] == "pgd-l2-3" and checkpoint.lineage["robust"]
    # Trust is how a file is read, not what comes out: the same folder is done without it.
    assert Checkpoint.load(converted(None, path.name).path).sha256 == checkpoint.sha256


def test_copies_that_differ_are_refused(peer, converted):
    state = {key: tensor.clone() for key, tensor in saved_state(peer.network).items()}
    state["module.attacker.model.fc.bias"] += 1
    with pytest.raises(RtkError, match=r"attacker\.model\.fc\.bias differs from its original"):
        converted({"model": state})


def test_a_file_saved_with_dill_says_so_where_dill_is_missing(peer, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['dill'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    path = tmp_path / "file.ckpt"
    content = {"model": saved_state(peer.network), "schedule": lambda t: 1}
    torch.save(content, path, pickle_module=dill)
    config = ConvertConfig(out=str(tmp_path / "out"), file=str(path), trust=True)
    with pytest.raises(RtkError, match=r"saved with dill, .* pip install 'rtk\[dill\]'"):
        convert.run(config)
    assert not (tmp_path / "out").exists()
