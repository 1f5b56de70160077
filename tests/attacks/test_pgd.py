import pytest
import torch
import torch.nn.functional as F
import torchattacks

from rtk import attacks, models, ops
from rtk.attacks import PGD
from rtk.config import AttackConfig, DataConfig
from rtk.data import Batches, load
from rtk.errors import RtkError
from rtk.train import accuracy, make_step

NORMS = ("linf", "l2")
EPS = {"linf": 8 / 255, "l2": 0.5}


def distance(x_adv, x, norm):
    delta = (x_adv - x).flatten(1)
    return delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(model, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def flags(model):
    return {name: module.training for name, module in model.named_modules()}


def test_pgd_linf_is_torchattacks_bit_for_bit(model, batch):
    x, y = batch
    ours = PGD(eps=8 / 255, step_size=2 / 255, steps=10, random_start=False)(model, x, y)
    theirs = torchattacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=10, random_start=False)(x, y)
    assert not torch.equal(ours, x)
    assert torch.equal(ours, theirs)


def test_pgd_l2_is_torchattacks(model, batch):
    x, y = batch
    ours = PGD("l2", eps=0.5, step_size=0.1, steps=10, random_start=False)(model, x, y)
    theirs = torchattacks.PGDL2(model, eps=0.5, alpha=0.1, steps=10, random_start=False)(x, y)
    assert distance(ours, x, "l2").min() > 0.3
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-7)


@pytest.mark.parametrize("bn_mode", ["eval", "train"])
@pytest.mark.parametrize("random_start", [False, True], ids=["from_image", "random_start"])
@pytest.mark.parametrize("norm", NORMS)
def test_adversarial_images_stay_in_the_ball_and_in_range(
    model, batch, norm, random_start, bn_mode
):
    x, y = batch
    eps = EPS[norm]
    # Steps as long as the radius: without projection the end would be far outside.
    attack = PGD(norm, eps, eps, 4, random_start, bn_mode)
    x_adv = attack(model, x, y)
    assert distance(x_adv, x, norm).max() <= eps * (1 + 1e-5)
    assert distance(x_adv, x, norm).max() > eps / 2
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert x_adv.dtype == x.dtype and not x_adv.requires_grad


@pytest.mark.parametrize("norm", NORMS)
def test_no_steps_give_the_start(model, batch, norm):
    x, y = batch
    assert torch.equal(PGD(norm, EPS[norm], steps=0, random_start=False)(model, x, y), x)
    start = PGD(norm, EPS[norm], steps=0)(model, x, y, seed=5)
    assert torch.equal(start, ops.pgd_init(x, eps=EPS[norm], norm=norm, seed=5))
    assert not torch.equal(start, x)


def test_an_eps_of_zero_gives_the_image(model, batch):
    x, y = batch
    for norm in NORMS:
        assert torch.equal(PGD(norm, eps=0.0, step_size=0.1, steps=3)(model, x, y), x)


def test_the_loss_rises_with_the_steps(model, batch):
    x, y = batch

    def loss(steps):
        attack = PGD(eps=0.05, step_size=0.01, steps=steps, random_start=False)
        with torch.no_grad():
            return F.cross_entropy(model(attack(model, x, y)), y).item()

    losses = [loss(steps) for steps in (0, 1, 3, 10)]
    assert losses == sorted(losses)
    assert losses[-1] > losses[0] + 0.1


@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_eval_mode_attack_leaves_the_model_as_it_was(model, batch, mode):
    model.train(mode != "eval")
    if mode == "mixed":
        model.layer1.eval()
        model.bn1.eval()
        model.layer4.requires_grad_(False)
    state, modes = snapshot(model), flags(model)
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    PGD(steps=2)(model, *batch)
    assert same_state(model, state)
    assert flags(model) == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == learned


def test_gradients_that_are_there_stay(model, batch):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    PGD(steps=2)(model, *batch)
    assert all((parameter.grad == 1).all() for parameter in model.parameters())


def test_train_mode_attack_uses_and_updates_batch_statistics(model, batch):
    x, y = batch
    model.train()
    model.layer2.eval()
    modes = flags(model)
    seen = model.bn1.num_batches_tracked.item()
    by_batch = PGD(steps=3, random_start=False, bn_mode="train")(model, x, y)
    assert model.bn1.num_batches_tracked.item() == seen + 3
    assert flags(model) == modes
    by_running = PGD(steps=3, random_start=False, bn_mode="eval")(model, x, y)
    assert not torch.equal(by_batch, by_running)


def test_modes_come_back_after_an_error(model, batch):
    x, y = batch
    model.train()
    modes = flags(model)
    with pytest.raises(RtkError, match="labels"):
        PGD(steps=1)(model, x, y + 100)
    assert flags(model) == modes
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_random_start_follows_torchs_generator(model, batch):
    attack = PGD(steps=1)

    def run(seed):
        torch.manual_seed(seed)
        return attack(model, *batch)

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))
    assert not torch.equal(attack(model, *batch), attack(model, *batch))


def test_a_seed_fixes_the_start_and_leaves_torchs_generator_alone(model, batch):
    attack = PGD(steps=1)
    before = torch.get_rng_state()
    first = attack(model, *batch, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, attack(model, *batch, seed=7))
    assert not torch.equal(first, attack(model, *batch, seed=8))


def test_works_inside_no_grad_and_on_images_that_require_grad(model, batch):
    x, y = batch
    expected = PGD(steps=2, random_start=False)(model, x, y)
    with torch.no_grad():
        assert torch.equal(PGD(steps=2, random_start=False)(model, x, y), expected)
    got = PGD(steps=2, random_start=False)(model, x.clone().requires_grad_(), y)
    assert torch.equal(got, expected) and not got.requires_grad


def test_autocast_keeps_the_images_fp32_and_in_the_ball(model, batch):
    x, y = batch
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_adv = PGD(steps=3)(model, x, y)
    assert x_adv.dtype == torch.float32
    assert distance(x_adv, x, "linf").max() <= 8 / 255 * (1 + 1e-5)


def test_breaks_a_trained_model():
    torch.manual_seed(0)
    dataset = load(DataConfig("digits[0-1]"))
    model = models.create(
        models.ModelSpec("resnet18", "3x3", 0.125, 2, (0.3,) * 3, (0.4,) * 3)
    ).train()
    step = make_step(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), amp=None)
    batches = Batches(dataset.train, 32, shuffle=True, drop_last=True)
    for epoch in range(2):
        for x, y in batches.epoch(epoch):
            step(x, y)
    test = Batches(dataset.test, 128)
    natural = accuracy(model, test).top1
    attacked = accuracy(model, test, PGD(eps=0.3, step_size=0.05, steps=10)).top1
    assert natural > 0.95
    assert attacked < natural - 0.5


BAD = {
    "nan": (lambda x: x.index_fill(0, torch.tensor([3]), torch.nan), "finite"),
    "inf": (lambda x: x.index_fill(0, torch.tensor([3]), torch.inf), "finite"),
    "above_1": (lambda x: x * 255, r"images must lie in \[0, 1\].*pixels / 255"),
    "below_0": (lambda x: x - 0.5, r"images must lie in \[0, 1\]"),
    "uint8": (lambda x: (x * 255).to(torch.uint8), "floating"),
    "uint8_zeros": (lambda x: torch.zeros_like(x, dtype=torch.uint8), "floating"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("random_start", [False, True], ids=["from_image", "random_start"])
def test_bad_images_are_refused(model, batch, bad, random_start):
    spoil, message = BAD[bad]
    x, y = batch
    with pytest.raises(RtkError, match=message):
        PGD(steps=1, random_start=random_start)(model, spoil(x), y)


@pytest.mark.parametrize("label", [4, -1])
def test_labels_without_a_class_are_refused(model, batch, label):
    x, y = batch
    with pytest.raises(RtkError, match=r"labels must be in \[0, 4\).*" + str(label)):
        PGD(steps=1)(model, x, y.index_fill(0, torch.tensor([2]), label))


def test_only_the_first_batch_is_looked_at(model, batch):
    x, y = batch
    attack = PGD(steps=1, random_start=False)
    attack(model, x, y)
    assert attack(model, x + 1, y).max() <= 1  # clipped, not refused
    with pytest.raises(RtkError, match="images must lie in"):
        PGD(steps=1, random_start=False)(model, x + 1, y)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "l3"}, "unknown norm 'l3'.*did you mean 'l2'"),
        ({"bn_mode": "evl"}, "unknown bn_mode 'evl'.*did you mean 'eval'"),
        ({"eps": -0.1}, "eps must be >= 0, got -0.1"),
        ({"step_size": -1.0}, "step_size must be >= 0"),
        ({"steps": -1}, "steps must be >= 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(RtkError, match=message):
        PGD(**arguments)


def test_create_makes_what_the_configuration_says():
    assert attacks.create(AttackConfig()) is None
    config = AttackConfig("pgd", "l2", 0.5, None, 20, False, "train")
    assert attacks.create(config) == PGD("l2", 0.5, 0.125, 20, False, "train")
    with pytest.raises(RtkError, match=r"unknown attack 'pdg'.*did you mean 'pgd'"):
        attacks.create(AttackConfig("pdg"))
