"""Targets, restarts, the best iterate and early stopping."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import torchattacks

from rtk.attacks import PGD
from rtk.errors import RtkError

EPS = {"linf": 0.08, "l2": 0.6}


def pgd(norm="linf", steps=10, **options):
    return PGD(norm, EPS[norm], EPS[norm] / 4, steps, **options)


def distance(x_adv, x, norm):
    delta = (x_adv - x).flatten(1)
    return delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)


def test_targeted_is_torchattacks_bit_for_bit(model, batch):
    x, y = batch
    theirs = torchattacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=5, random_start=False)
    theirs.set_mode_targeted_by_label(quiet=True)
    target = (y + 1) % 4
    ours = PGD(steps=5, random_start=False, targeted=True)(model, x, target)
    assert torch.equal(ours, theirs(x, target))


def test_a_target_is_reached(trained, wrong):
    model, x, y = trained
    target = (y + 1) % 5
    reached = ~wrong(
        model, PGD(eps=0.3, step_size=0.05, steps=20, targeted=True)(model, x, target), target
    )
    assert reached.float().mean() > 0.5 > (~wrong(model, x, target)).float().mean()


@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("norm", EPS)
def test_the_best_iterate_is_the_best_of_the_plain_run(trained, losses, norm, targeted):
    """Steps of two radii jump to and fro, so the last iterate is often not the best."""
    model, x, y = trained
    eps = EPS[norm]
    sign = -1 if targeted else 1
    iterates = torch.stack(
        [
            PGD(norm, eps, 2 * eps, steps, targeted=targeted)(model, x, y, seed=3)
            for steps in range(5)
        ]
    )
    expected = torch.stack([sign * losses(model, x_adv, y) for x_adv in iterates])
    best = PGD(norm, eps, 2 * eps, 4, targeted=targeted, keep_best=True)(model, x, y, seed=3)
    got = sign * losses(model, best, y)
    torch.testing.assert_close(got, expected.amax(0), rtol=1e-4, atol=1e-6)
    assert (got >= expected[-1] - 1e-6).all() and (got > expected[-1] + 1e-3).any()
    chosen = iterates[expected.argmax(0), torch.arange(len(x))]
    torch.testing.assert_close(best, chosen, rtol=0, atol=1e-6)
    assert distance(best, x, norm).max() <= eps * (1 + 1e-5)


def test_restarts_only_raise_the_loss(trained, losses):
    model, x, y = trained
    one, two, four = (
        losses(model, pgd(restarts=restarts)(model, x, y, seed=5), y) for restarts in (1, 2, 4)
    )
    assert (two >= one - 1e-6).all() and (four >= two - 1e-6).all()
    assert four.mean() > one.mean() + 1e-3


def test_restarts_keep_the_best_end(trained, losses):
    model, x, y = trained
    ends = [pgd()(model, x, y, seed=5 + restart) for restart in range(3)]
    best = torch.stack([losses(model, end, y) for end in ends]).amax(0)
    got = losses(model, pgd(restarts=3)(model, x, y, seed=5), y)
    torch.testing.assert_close(got, best, rtol=1e-4, atol=1e-6)


def test_the_greatest_seed_has_a_next_one(model, batch):
    PGD(steps=0, restarts=2)(model, *batch, seed=2**63 - 1)


def test_a_tensor_is_a_seed_too(model, batch):
    attack = PGD(steps=1, restarts=2)
    by_tensor = attack(model, *batch, seed=torch.tensor([7]))
    assert torch.equal(by_tensor, attack(model, *batch, seed=7))


@pytest.mark.parametrize("norm", EPS)
def test_early_stop_keeps_the_first_success(trained, wrong, norm):
    model, x, y = trained
    got = pgd(norm, early_stop=True)(model, x, y, seed=3)
    waiting = torch.ones(len(y), dtype=torch.bool)
    for steps in range(11):
        x_adv = pgd(norm, steps)(model, x, y, seed=3)
        fooled = waiting & wrong(model, x_adv, y)
        torch.testing.assert_close(got[fooled], x_adv[fooled], rtol=0, atol=1e-5)
        waiting &= ~fooled
    assert 5 < waiting.sum() < len(y) - 5  # some were fooled, some never
    torch.testing.assert_close(got[waiting], x_adv[waiting], rtol=0, atol=1e-5)
    assert torch.equal(wrong(model, got, y), ~waiting)


def test_early_stop_computes_finished_images_no_longer(trained):
    model, x, y = trained
    sizes = []
    hook = model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    attack = PGD(eps=0.3, step_size=0.05, steps=20, early_stop=True, restarts=2)
    attack(model, x, y)
    hook.remove()
    sizes = sizes[1:]  # the look at the labels of the first batch
    assert sizes[0] == 64 and sizes == sorted(sizes, reverse=True)
    assert all(after == before or 2 * after <= before for before, after in pairwise(sizes))
    assert sum(sizes) < 0.5 * 2 * 20 * 64


def test_early_stop_with_everything_fooled_at_once(trained):
    model, x, y = trained
    other = (y + 1) % 5
    x, other = x[:1], other[:1]
    assert torch.equal(PGD(random_start=False, early_stop=True)(model, x, other), x)


def test_more_restarts_never_fool_fewer_with_early_stop(trained, wrong):
    model, x, y = trained
    fooled = [
        wrong(model, pgd(restarts=n, early_stop=True)(model, x, y, seed=1), y) for n in (1, 2, 4)
    ]
    assert (fooled[1] | ~fooled[0]).all()
    assert fooled[0].sum() <= fooled[1].sum() <= fooled[2].sum()


def test_the_options_change_no_bit_of_a_plain_run(model, batch):
    plain = PGD(steps=3, random_start=False)(model, *batch)
    counted = PGD(steps=3, random_start=False, count_nonfinite=True)(model, *batch)
    assert torch.equal(plain, counted)


def test_a_loss_that_is_nan_keeps_the_image(batch):
    x, y = batch

    def broken(images):
        return images.flatten(1)[:, :4] * torch.nan

    module = torch.nn.Module()
    module.forward = broken
    attack = PGD(steps=2, random_start=False, keep_best=True)
    attack._guard._first = False
    assert torch.equal(attack(module, x, y), x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"restarts": 0}, "PGD: restarts must be >= 1, got 0"),
        ({"restarts": 2, "random_start": False}, "PGD: restarts .* all alike; use random_start"),
        ({"early_stop": True, "bn_mode": "train"}, "early_stop makes the batch smaller"),
        ({"eps": float("nan")}, "eps must be >= 0, got nan"),
    ],
    ids=["no_restarts", "restarts_of_the_image", "early_stop_in_train_mode", "nan"],
)
def test_bad_options_are_refused(arguments, message):
    with pytest.raises(RtkError, match=message):
        PGD(**arguments)


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize(
    "options", [{}, {"keep_best": True}, {"early_stop": True, "restarts": 2}], ids=str
)
def test_batches_of_any_size(model, batch, options, count):
    x, y = batch
    attack = PGD(steps=2, **options)
    attack(model, x, y)
    x_adv = attack(model, x[:count], y[:count])
    assert x_adv.shape == x[:count].shape
    assert count == 0 or 0 < (x_adv - x[:count]).abs().max() <= 8 / 255 * (1 + 1e-5)


def test_options_work_in_train_mode_and_put_it_back(model, batch):
    model.train()
    x_adv = PGD(steps=2, bn_mode="train", keep_best=True, restarts=2)(model, *batch)
    assert model.training and model.layer1.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert F.cross_entropy(model(x_adv), batch[1]).isfinite()
