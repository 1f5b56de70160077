import pytest
import torch

from rtk import ops
from rtk.attacks import Smoothing
from rtk.errors import RtkError


def test_it_adds_the_ops_noise_and_does_not_clip(batch):
    x, y = batch
    noisy = Smoothing(0.5)(None, x, y, seed=3)
    assert torch.equal(noisy, ops.gaussian_noise(x, sigma=0.5, seed=3))
    assert noisy.min() < 0 and noisy.max() > 1


def test_the_noise_is_gaussian_with_deviation_sigma():
    x = torch.full((40, 3, 32, 32), 0.5)
    noise = Smoothing(0.25)(None, x, torch.zeros(40, dtype=torch.int64), seed=1) - x
    assert noise.mean().abs() < 3e-3
    assert noise.std().item() == pytest.approx(0.25, rel=0.01)
    assert (noise.abs() < 0.25).float().mean().item() == pytest.approx(0.6827, abs=5e-3)


def test_it_follows_torchs_generator(batch):
    attack = Smoothing()

    def draw(seed):
        torch.manual_seed(seed)
        return attack(None, *batch)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    torch.manual_seed(1)
    assert torch.equal(draw(1), attack(None, *batch, seed=_drawn(attack)))


def _drawn(attack):
    torch.manual_seed(1)
    return attack.draw_seed()


def test_no_noise_gives_the_image(batch):
    assert torch.equal(Smoothing(0.0)(None, *batch), batch[0])


def test_images_that_require_grad_and_empty_batches(batch):
    x, y = batch
    assert not Smoothing()(None, x.clone().requires_grad_(), y).requires_grad
    assert Smoothing()(None, x[:0], y[:0]).shape == (0, 3, 8, 8)


def test_bad_input_is_refused(batch):
    with pytest.raises(RtkError, match=r"Smoothing: sigma must be >= 0 in pixel scale, got -0\.1"):
        Smoothing(-0.1)
    with pytest.raises(RtkError, match="images must be floating"):
        Smoothing()(None, batch[0].to(torch.uint8), batch[1])
