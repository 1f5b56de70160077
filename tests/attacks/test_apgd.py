import pytest
import torch
import torch.nn.functional as F
import torchattacks
from torch import nn

from rtk.attacks import APGD, PGD
from rtk.errors import RtkError

THEIR_NORM = {"linf": "Linf", "l2": "L2"}
EPS = {"linf": 0.1, "l2": 0.6}


def distance(x_adv, x, norm):
    delta = (x_adv - x).flatten(1)
    return delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)


def their_start(x, norm, eps):
    """Return torchattacks' start, drawn from torch's generator as it draws it."""
    if norm == "linf":
        t = 2 * torch.rand(x.shape) - 1
        length = t.flatten(1).abs().amax(1).view(-1, 1, 1, 1)
    else:
        t = torch.randn(x.shape)
        length = (t**2).sum((1, 2, 3), keepdim=True).sqrt() + 1e-12
    return (x + eps * t / length).clamp(0, 1)


@pytest.mark.parametrize("steps", [1, 20, 50])
@pytest.mark.parametrize(("norm", "tolerance"), [("linf", 0.0), ("l2", 1e-5)])
def test_it_is_torchattacks_from_the_same_start(trained, monkeypatch, norm, tolerance, steps):
    """Linf to the bit: the same checkpoints, halvings and returns to the best."""
    model, x, y = trained
    eps = EPS[norm]
    theirs = torchattacks.APGD(model, norm=THEIR_NORM[norm], eps=eps, steps=steps)
    torch.manual_seed(3)
    best, right, _, adversarial = theirs.attack_single_run(x, y)
    expected = torch.where(right.view(-1, 1, 1, 1).bool(), best, adversarial).detach()
    torch.manual_seed(3)
    start = their_start(x, norm, eps)
    monkeypatch.setattr(APGD, "_start", lambda self, x, seed: start)
    ours = APGD(norm, eps, steps)(model, x, y)
    assert right.any() and not right.all()
    # In L2 theirs rounds elsewhere, and an image whose losses are nearly equal may go another way.
    close = (ours - expected).flatten(1).abs().amax(1) <= tolerance
    assert close.all() if norm == "linf" else close.float().mean() > 0.9
    torch.testing.assert_close(ours, expected, rtol=0, atol=0 if norm == "linf" else 0.01)
    assert distance(ours, x, norm).max() <= eps * (1 + 1e-5)


@pytest.mark.parametrize("norm", EPS)
def test_it_is_at_least_as_strong_as_pgd_with_equal_steps(trained, losses, wrong, norm):
    model, x, y = trained
    eps = EPS[norm]
    pgd = PGD(norm, eps, eps / 4, 20)(model, x, y, seed=1)
    apgd = APGD(norm, eps, 20)(model, x, y, seed=1)
    assert wrong(model, apgd, y).sum() >= wrong(model, pgd, y).sum() > 5
    if norm == "linf":
        assert losses(model, apgd, y).mean() > losses(model, pgd, y).mean()


@pytest.mark.parametrize("norm", EPS)
def test_images_stay_in_the_ball_and_in_range(trained, norm):
    model, x, y = trained
    x_adv = APGD(norm, 0.4, 5, restarts=2)(model, x, y)
    assert 0.2 < distance(x_adv, x, norm).max() <= 0.4 * (1 + 1e-5)
    assert x_adv.min() >= 0 and x_adv.max() <= 1 and not x_adv.requires_grad


def test_restarts_never_fool_fewer_and_leave_the_fooled_alone(trained, wrong):
    model, x, y = trained
    one, three = (APGD(eps=0.1, steps=5, restarts=n)(model, x, y, seed=2) for n in (1, 3))
    fooled = wrong(model, one, y)
    assert torch.equal(one[fooled], three[fooled])
    assert (wrong(model, three, y) | ~fooled).all()
    assert not torch.equal(one[~fooled], three[~fooled])


def test_a_seed_fixes_the_start(model, batch):
    attack = APGD(steps=2)
    assert torch.equal(attack(model, *batch, seed=1), attack(model, *batch, seed=1))
    assert not torch.equal(attack(model, *batch, seed=1), attack(model, *batch, seed=2))
    torch.manual_seed(4)
    drawn = attack(model, *batch)
    torch.manual_seed(4)
    assert torch.equal(attack(model, *batch, seed=attack.draw_seed()), drawn)


@pytest.mark.parametrize("norm", EPS)
def test_no_steps_and_no_radius(model, batch, norm):
    x, y = batch
    assert torch.equal(APGD(norm, 0.0, 3)(model, x, y), x)
    start = APGD(norm, 0.1, 0)(model, x, y, seed=1)
    assert torch.equal(start, APGD(norm, 0.1)._start(x, 1))


def test_images_do_not_depend_on_each_other(trained):
    model, x, y = trained
    whole = APGD(steps=10, eps=0.1)
    torch.manual_seed(0)
    start = torch.rand_like(x)
    together, *_ = whole._run(_gradient(model), x, y, start)
    for chosen in (slice(3, 4), slice(10, 20)):
        alone, *_ = whole._run(_gradient(model), x[chosen], y[chosen], start[chosen])
        torch.testing.assert_close(alone, together[chosen], rtol=0, atol=1e-5)


def _gradient(model):
    def gradient(x, y):
        x = x.detach().requires_grad_()
        logits = model(x)
        (grad,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), x)
        return grad, logits.detach()

    return gradient


@pytest.mark.parametrize("norm", EPS)
def test_a_gradient_in_bf16_is_used_in_the_images_precision(trained, norm):
    """A fused engine gives such; lengths of it are taken, and images kept, in fp32."""
    model, x, y = trained
    exact = _gradient(model)

    def narrow(x, y):
        grad, logits = exact(x, y)
        return grad.bfloat16(), logits

    attack = APGD(norm, EPS[norm], 10)
    start = attack._start(x, 1)
    x_adv, loss, _ = attack._run(narrow, x, y, start)
    assert x_adv.dtype == torch.float32
    assert distance(x_adv, x, norm).max() <= EPS[norm] * (1 + 1e-5)
    assert loss.mean() > 0.8 * attack._run(exact, x, y, start)[1].mean()


def test_the_model_is_left_as_it_was(model, batch):
    model.train()
    model.layer2.eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    APGD(steps=3)(model, *batch)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_flat_loss_is_no_error(batch):
    x, y = batch
    constant = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    nn.init.zeros_(constant[1].weight)
    for norm in EPS:
        assert APGD(norm, 0.1, 10)(constant, x, y).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "l1"}, "unknown norm 'l1'"),
        ({"bn_mode": "train"}, "unknown bn_mode for APGD 'train': expected one of eval"),
        ({"eps": -1.0}, "APGD: eps must be >= 0, got -1"),
        ({"steps": -1}, "APGD: steps must be >= 0"),
        ({"restarts": 0}, "APGD: restarts must be >= 1"),
        ({"rho": 1.5}, r"APGD: rho must be a share in \[0, 1\], got 1.5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(RtkError, match=message):
        APGD(**arguments)
