"""The adapters, against stand-ins with the packages' own signatures."""

import sys
import types

import pytest
import torch

from rtk import attacks
from rtk.attacks import AutoAttack, Foolbox
from rtk.config import AttackConfig
from rtk.errors import RtkError


@pytest.fixture
def autoattack(monkeypatch):
    module = types.ModuleType("autoattack")
    module.made = []

    class Theirs:
        def __init__(
            self,
            model,
            norm="Linf",
            eps=0.3,
            seed=None,
            verbose=True,
            attacks_to_run=[],  # noqa: B006  (as theirs)
            version="standard",
            is_tf_model=False,
            device="cuda",
            log_path=None,
        ):
            self.settings = (norm, eps, version, device, verbose)
            self.model, self.seed = model, seed
            module.made.append(self)

        def run_standard_evaluation(self, x_orig, y_orig, bs=250, return_labels=False):
            self.batch = bs
            self.training = any(m.training for m in self.model.modules())
            with torch.no_grad():
                assert self.model(x_orig).shape == (len(x_orig), 4)
            torch.manual_seed(self.seed)
            return (x_orig + self.settings[1] * torch.rand_like(x_orig)).clamp(0, 1)

    module.AutoAttack = Theirs
    monkeypatch.setitem(sys.modules, "autoattack", module)
    return module


@pytest.fixture
def foolbox(monkeypatch):
    module = types.ModuleType("foolbox")
    module.attacks = types.SimpleNamespace()
    module.seen = []

    class PyTorchModel:
        def __init__(self, model, bounds, device=None, preprocessing=None):
            module.seen.append((bounds, device, any(m.training for m in model.modules())))
            self.model = model

    class LinfDeepFoolAttack:
        def __init__(self, steps=50):
            self.steps = steps

        def __call__(self, model, inputs, criterion, *, epsilons, **kwargs):
            assert isinstance(model, PyTorchModel) and criterion.dtype == torch.int64
            raw = inputs + 10 * epsilons
            clipped = (inputs + epsilons).clamp(0, 1)
            return raw, clipped, torch.ones(len(inputs), dtype=torch.bool)

    module.PyTorchModel = PyTorchModel
    module.attacks.LinfDeepFoolAttack = LinfDeepFoolAttack
    monkeypatch.setitem(sys.modules, "foolbox", module)
    return module


@pytest.mark.parametrize(("norm", "theirs"), [("linf", "Linf"), ("l2", "L2")])
def test_autoattack_is_asked_as_it_wants_to_be(autoattack, model, batch, norm, theirs):
    x, y = batch
    model.train()
    x_adv = AutoAttack(norm, 0.1, "plus")(model, x, y, seed=3)
    (made,) = autoattack.made
    assert made.settings == (theirs, 0.1, "plus", x.device, False)
    assert made.batch == len(x) and not made.training and model.training
    torch.manual_seed(3)
    assert torch.equal(x_adv, (x + 0.1 * torch.rand_like(x)).clamp(0, 1))


def test_autoattack_leaves_torchs_generator_alone(autoattack, model, batch):
    before = torch.get_rng_state()
    AutoAttack()(model, *batch, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_foolbox_by_name_and_by_object(foolbox, model, batch):
    x, y = batch
    model.train()
    expected = (x + 0.1).clamp(0, 1)
    assert torch.equal(Foolbox("LinfDeepFoolAttack", 0.1)(model, x, y), expected)
    attack = foolbox.attacks.LinfDeepFoolAttack(steps=3)
    assert torch.equal(Foolbox(attack, 0.1)(model, x, y), expected)
    assert foolbox.seen == [((0, 1), x.device, False)] * 2 and model.training


def test_an_unknown_foolbox_attack_is_refused(foolbox, model, batch):
    with pytest.raises(RtkError, match=r"no 'LinfDeepFool'.*did you mean 'LinfDeepFoolAttack'"):
        Foolbox("LinfDeepFool")(model, *batch)


@pytest.mark.parametrize(
    ("attack", "module", "pip"),
    [
        (AutoAttack(), "autoattack", r"pip install git\+https://github\.com/fra31/auto-attack"),
        (Foolbox("LinfPGD"), "foolbox", "pip install foolbox"),
    ],
    ids=["autoattack", "foolbox"],
)
def test_a_missing_package_is_named_with_the_remedy(monkeypatch, model, batch, attack, module, pip):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RtkError, match=f"needs the package {module}.*{pip}"):
        attack(model, *batch)


def test_they_are_made_by_name(autoattack, foolbox):
    assert attacks.create(AttackConfig("autoattack", "l2", 0.5)) == AutoAttack("l2", 0.5)
    config = AttackConfig("foolbox:LinfDeepFoolAttack", eps=0.1)
    assert attacks.create(config) == Foolbox("LinfDeepFoolAttack", 0.1)
    assert config.label == "foolbox-LinfDeepFoolAttack-linf-0.1"
    with pytest.raises(RtkError, match="attack foolbox: name the class too"):
        attacks.create(AttackConfig("foolbox"))


def test_batches_without_images_and_bad_settings(autoattack, foolbox, model, batch):
    x, y = batch
    for attack in (AutoAttack(), Foolbox("LinfDeepFoolAttack")):
        assert attack(model, x[:0], y[:0]).shape == x[:0].shape
        with pytest.raises(RtkError, match="images must lie in"):
            attack(model, x * 255, y)
    with pytest.raises(RtkError, match="unknown version of AutoAttack 'fast'"):
        AutoAttack(version="fast")
    with pytest.raises(RtkError, match="Foolbox: eps must be >= 0"):
        Foolbox("x", -1.0)
