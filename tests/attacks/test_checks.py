"""What attacks look at: labels, gradients that are not finite; and models in half precision."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rtk.attacks import APGD, FGSM, PGD, Fast, Smoothing, Square
from rtk.attacks.gradient import cross_entropy
from rtk.attacks.precision import accepting, image_losses, loss_to_climb
from rtk.errors import RtkError

GRADIENT_ATTACKS = {
    "pgd": lambda: PGD(steps=3),
    "fgsm": FGSM,
    "fast": Fast,
    "apgd": lambda: APGD(steps=3),
    "early_stop": lambda: PGD(steps=3, early_stop=True, keep_best=True),
}
ALL = {**GRADIENT_ATTACKS, "square": lambda: Square(queries=3)}


class RootOfZero(nn.Module):
    """Finite logits whose gradient in the images is not: d sqrt(v) / dv at 0."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.broken = True

    def forward(self, x):
        logits = self.model(x)
        return logits + (x.flatten(1).sum(1, keepdim=True) * 0).sqrt() if self.broken else logits


def test_a_nan_gradient_would_look_like_robustness(model, batch):
    """Why it is looked for: the sign of a NaN is 0."""
    x, y = batch
    attack = PGD(steps=2, random_start=False)
    attack._guard._first = False
    assert torch.equal(attack(RootOfZero(model), x, y), x)


@pytest.mark.parametrize("name", GRADIENT_ATTACKS)
def test_gradients_that_are_not_finite_are_told_on_the_first_batch(model, batch, name):
    message = r"gradient in the images is NaN or infinite in iteration 1 of.*model\.float\(\)"
    with pytest.raises(RtkError, match=message):
        GRADIENT_ATTACKS[name]()(RootOfZero(model), *batch)


@pytest.mark.parametrize("name", ["pgd", "apgd"])
def test_later_ones_are_counted_for_the_end(model, batch, name):
    broken = RootOfZero(model)
    attack = GRADIENT_ATTACKS[name]()
    attack.count_nonfinite = True
    broken.broken = False
    attack(broken, *batch)
    attack.check_finite()
    broken.broken = True
    attack(broken, *batch)
    broken.broken = False
    attack(broken, *batch)
    count = 3 if name == "pgd" else 4
    with pytest.raises(RtkError, match=f"{count} gradients .* not as robust as it looks"):
        attack.check_finite()
    attack.check_finite()  # told once


def test_without_counting_later_batches_are_not_looked_at(model, batch):
    broken = RootOfZero(model)
    attack = PGD(steps=1)
    broken.broken = False
    attack(broken, *batch)
    broken.broken = True
    attack(broken, *batch)
    attack.check_finite()


@pytest.mark.parametrize("name", ALL)
def test_labels_must_be_one_an_image(model, batch, name):
    x, y = batch
    for labels in (y[:-1], y.float(), F.one_hot(y, 4)):
        with pytest.raises(RtkError, match=r"labels must be int64 \(12,\), one an image"):
            ALL[name]()(model, x, labels)


@pytest.mark.parametrize("name", ALL)
def test_values_of_the_first_batch_are_looked_at(model, batch, name):
    x, y = batch
    with pytest.raises(RtkError, match="images must lie in"):
        ALL[name]()(model, x * 255, y)
    with pytest.raises(RtkError, match=r"images must lie in .* got nan"):
        ALL[name]()(model, x * torch.nan, y)
    with pytest.raises(RtkError, match=r"labels must be in \[0, 4\)"):
        ALL[name]()(model, x, y + 1)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("count", [0, 1])
def test_a_small_first_batch(model, batch, name, count):
    x, y = batch
    attack = ALL[name]()
    assert attack(model, x[:count], y[:count]).shape == x[:count].shape
    if count == 0:  # it does not count as the first
        with pytest.raises(RtkError, match="images must lie in"):
            attack(model, x * 255, y)


OF_A_RADIUS = {
    "pgd": lambda norm, eps: PGD(norm, eps, 0.1, 2),
    "pgd_keep_best": lambda norm, eps: PGD(norm, eps, 0.1, 2, restarts=2, keep_best=True),
    "fgsm": FGSM,
    "fast": Fast,
    "apgd": lambda norm, eps: APGD(norm, eps, 3),
    "square": lambda norm, eps: Square(norm, eps, 3),
}


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", OF_A_RADIUS)
def test_a_radius_of_zero_gives_the_images_and_a_negative_one_is_refused(model, batch, name, norm):
    x, y = batch
    x_adv = OF_A_RADIUS[name](norm, 0.0)(model, x, y)
    torch.testing.assert_close(x_adv, x, rtol=0, atol=0 if norm == "linf" else 1e-6)
    for eps in (-0.1, float("nan")):
        with pytest.raises(RtkError, match=r"(eps|step_size) must be >= 0"):
            OF_A_RADIUS[name](norm, eps)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_steps_of_length_zero_stay_at_the_start(model, batch, norm):
    x, y = batch
    still = PGD(norm, 0.1, step_size=0.0, steps=3, random_start=False)(model, x, y)
    torch.testing.assert_close(still, x, rtol=0, atol=1e-7)
    still = PGD(norm, 0.1, step_size=0.0, steps=3)(model, x, y, seed=3)
    start = PGD(norm, 0.1, steps=0)(model, x, y, seed=3)
    torch.testing.assert_close(still, start, rtol=0, atol=1e-6)
    assert not torch.equal(start, x)


def test_no_steps_give_a_start_that_is_in_range(model, batch):
    """Later batches are not looked at: they are clipped."""
    x, y = batch
    attack = PGD(steps=0, random_start=False)
    attack(model, x, y)
    assert torch.equal(attack(model, 3 * x - 1, y), (3 * x - 1).clamp(0, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_a_model_of_another_precision_is_attacked_in_fp32(trained, losses, name, dtype):
    """The images stay fp32 and in the ball; the logits' loss is taken in fp32."""
    model, x, y = trained
    attack = ALL[name]()
    converted = copy.deepcopy(model).to(dtype)
    x_adv = attack(converted, x, y, seed=1)
    assert x_adv.dtype == torch.float32
    assert (x_adv - x).abs().max() <= 8 / 255 * (1 + 1e-5)
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    if name not in ("square", "early_stop"):
        assert losses(model, x_adv, y).mean() > 1.2 * losses(model, x, y).mean()
    assert all(p.dtype == dtype and p.requires_grad for p in converted.parameters())
    assert not any(module.training for module in converted.modules())


def test_images_in_half_precision_stay_so(trained):
    model, x, y = trained
    x_adv = PGD(steps=2)(model, x.bfloat16(), y)
    assert x_adv.dtype == torch.bfloat16


def test_the_loss_does_not_vanish_in_fp16(model, batch):
    """A mean over 4096 images would divide their gradients below what fp16 can hold."""
    x, _ = batch
    logits = torch.tensor([[12.0, 0.0, 0.0, 0.0]]).half().requires_grad_()
    y = torch.tensor([0])
    half = copy.deepcopy(model).half()
    assert loss_to_climb(half, x) is image_losses
    assert loss_to_climb(model, x) is cross_entropy
    with torch.autocast("cpu", dtype=torch.float16):
        assert loss_to_climb(model, x) is image_losses
    many = logits.expand(4096, 4)
    (lost,) = torch.autograd.grad(cross_entropy(many, y.expand(4096)), many)
    (kept,) = torch.autograd.grad(image_losses(many, y.expand(4096)).sum(), many)
    assert (lost == 0).all() and (kept != 0).all()


def test_a_model_of_the_images_precision_is_not_wrapped(model, batch):
    """An engine may know the model by its identity."""
    assert accepting(model, batch[0]) is model
    plain = nn.Flatten()
    assert accepting(plain, batch[0]) is plain


def test_noise_has_no_use_for_a_model(batch):
    assert Smoothing(0.1)(None, *batch, seed=1).shape == batch[0].shape
