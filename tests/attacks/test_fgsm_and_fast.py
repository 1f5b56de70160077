import warnings

import pytest
import torch
import torchattacks
from torch import nn

from rtk import ops
from rtk.attacks import FGSM, PGD, Fast
from rtk.errors import RtkError


def test_fgsm_is_torchattacks_bit_for_bit(model, batch):
    x, y = batch
    ours = FGSM(eps=8 / 255)(model, x, y)
    assert torch.equal(ours, torchattacks.FGSM(model, eps=8 / 255)(x, y))
    assert (ours - x).abs().max() > 7 / 255


def test_fgsm_towards_a_target(model, batch):
    x, y = batch
    theirs = torchattacks.FGSM(model, eps=8 / 255)
    theirs.set_mode_targeted_by_label(quiet=True)
    target = (y + 1) % 4
    assert torch.equal(FGSM(targeted=True)(model, x, target), theirs(x, target))


def test_fgsm_in_l2_moves_by_eps(model, batch):
    x, y = batch
    x = 0.25 + x / 2  # nothing is clipped
    delta = FGSM("l2", 0.2)(model, x, y) - x
    torch.testing.assert_close(delta.flatten(1).norm(dim=1), torch.full((12,), 0.2))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fast_is_one_step_of_5_quarters_eps_from_a_random_start(model, batch, norm):
    x, y = batch
    start = ops.pgd_init(x, eps=0.1, norm=norm, seed=4)
    leaf = start.clone().requires_grad_()
    (grad,) = torch.autograd.grad(nn.functional.cross_entropy(model(leaf), y), leaf)
    expected = ops.pgd_step(start, grad, x, eps=0.1, step_size=0.125, norm=norm)
    assert torch.equal(Fast(norm, 0.1)(model, x, y, seed=4), expected)


def test_fast_takes_a_step_of_ones_own(model, batch):
    ours = Fast("linf", 0.1, 0.05)(model, *batch, seed=4)
    assert torch.equal(ours, PGD("linf", 0.1, 0.05, 1)(model, *batch, seed=4))
    with pytest.raises(RtkError, match="Fast: step_size must be >= 0, got -1"):
        Fast(step_size=-1.0)


EPS = 0.1


class Overfitted(nn.Module):
    """What catastrophic overfitting looks like: a long step jumps over the valley of wrong answers.

    The margin of class 0 falls from the image on, is lowest half the radius away, and has risen
    again where a step of 1.25 eps ends.
    """

    def forward(self, x):
        away = (x.flatten(1).mean(1) - 0.5).abs() / EPS
        margin = (away - 0.5).abs() - 0.3
        return torch.stack([margin, torch.zeros_like(margin)], 1)


def test_catastrophic_overfitting_is_told_once_with_numbers_and_remedy():
    attack = Fast(eps=EPS)
    x, y = torch.full((20, 3, 8, 8), 0.5), torch.zeros(20, dtype=torch.int64)
    message = (
        r"catastrophic overfitting: of 20 .*100%.*\(loss 0\.\d+\) but only 0% under PGD-10 "
        r"\(loss 0\.\d+\), both linf 0\.1.*smaller --attack\.step_size.*--attack\.name pgd"
    )
    with pytest.warns(UserWarning, match=message):
        attack.after_epoch(Overfitted(), x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack.after_epoch(Overfitted(), x, y)


def test_a_healthy_network_is_left_in_peace(trained):
    model, x, y = trained
    attack = Fast(eps=0.03)
    model.train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack.after_epoch(model, x, y)
        attack.after_epoch(model, x[:0], y[:0])
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    model.eval()
