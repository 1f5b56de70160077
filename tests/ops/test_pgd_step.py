"""pgd_step: torchattacks' update line by line, and what must hold of every step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rtk.errors import RtkError
from rtk.ops import pgd_step

OP = "pgd_step"
EPS, STEP = 8 / 255, 2 / 255
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels-last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "every-second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
}
# (x_adv, grad, x) that the C++ code takes; a backend not named takes all
SERVED = {
    "cpu": (
        {torch.float32, torch.bfloat16},
        {torch.float32, torch.bfloat16, torch.float16},
        {torch.float32, torch.uint8},
    )
}


def torchattacks_linf(adv_images, grad, images, eps, alpha):
    """The loop body of torchattacks 3.5.1's PGD."""
    adv_images = adv_images.detach() + alpha * grad.sign()
    delta = torch.clamp(adv_images - images, min=-eps, max=eps)
    return torch.clamp(images + delta, min=0, max=1).detach()


def torchattacks_l2(adv_images, grad, images, eps, alpha):
    """The loop body of torchattacks 3.5.1's PGDL2."""
    batch_size = len(images)
    grad_norms = torch.norm(grad.view(batch_size, -1), p=2, dim=1) + 1e-10
    grad = grad / grad_norms.view(batch_size, 1, 1, 1)
    adv_images = adv_images.detach() + alpha * grad
    delta = adv_images - images
    delta_norms = torch.norm(delta.view(batch_size, -1), p=2, dim=1)
    factor = eps / delta_norms
    factor = torch.min(factor, torch.ones_like(delta_norms))
    delta = delta * factor.view(-1, 1, 1, 1)
    return torch.clamp(images + delta, min=0, max=1).detach()


def images(device: str, radius: float = EPS, n: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Return x_adv within and beyond the ball, a gradient, and x with pixels at 0 and 1."""
    x = (torch.rand(n, 3, 9, 7) * 1.4 - 0.2).clamp(0, 1).to(device)
    x_adv = (x + radius * 1.5 * (torch.rand_like(x) * 2 - 1)).clamp(0, 1)
    return x_adv, torch.randn_like(x), x


@pytest.mark.parametrize(
    ("eps", "step"), [(EPS, STEP), (0.1, 0.25), (1e-3, 1.0), (0.5, 1e-4), (0.3, 0.0)], ids=str
)
def test_linf_is_torchattacks_bit_for_bit(eps, step, backend, device):
    x_adv, grad, x = images(device, eps)
    grad[:, :, 0] = 0
    wanted = torchattacks_linf(x_adv, grad, x, eps, step)
    assert torch.equal(pgd_step(x_adv, grad, x, eps=eps, step_size=step), wanted)


@pytest.mark.parametrize(
    ("eps", "step"), [(0.5, 0.1), (128 / 255, 15 / 255), (1e-3, 1.0), (20.0, 0.1)], ids=str
)
def test_l2_is_torchattacks(eps, step, backend, device):
    x_adv, grad, x = images(device, eps / 10)
    wanted = torchattacks_l2(x_adv, grad, x, eps, step)
    out = pgd_step(x_adv, grad, x, eps=eps, step_size=step, norm="l2")
    torch.testing.assert_close(out, wanted, rtol=0, atol=2e-7 * max(1, step))


@pytest.mark.parametrize("clip", [(0.0, 1.0), (-2.0, 3.0), (0.4, 0.6)], ids=str)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("eps", [0.0, 1 / 255, 0.3])
def test_the_step_stays_in_the_ball_and_in_the_range(eps, norm, clip, backend, device):
    x_adv, grad, x = images(device, 0.5)
    x = x * (clip[1] - clip[0]) + clip[0]
    out = pgd_step(x_adv, grad, x, eps=eps, step_size=0.1, norm=norm, clip=clip)
    assert torch.equal(out.clamp(*clip), out)
    delta = (out.double() - x.double()).flatten(1)
    ulp = 2.0**-23 * max(map(abs, clip))
    if norm == "linf":
        assert delta.abs().max() <= eps + ulp
    else:
        assert delta.norm(dim=1).max() <= eps * (1 + 1e-6) + ulp * delta.shape[1] ** 0.5
    if eps == 0:
        assert torch.equal(out, x)
    else:
        assert not torch.equal(out, x)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_large_batches_and_large_images(norm, backend, device, two_threads):
    """Several threads over images, and several threads inside one image."""
    formula = torchattacks_linf if norm == "linf" else torchattacks_l2
    for shape in [(64, 3, 40, 40), (1, 3, 300, 301)]:
        x = torch.rand(shape, device=device)
        grad = torch.randn_like(x)
        out = pgd_step(x, grad, x, eps=0.1, step_size=0.3, norm=norm)
        atol = 0 if norm == "linf" else 3e-7
        torch.testing.assert_close(out, formula(x, grad, x, 0.1, 0.3), rtol=0, atol=atol)


def test_linf_a_nan_gradient_moves_no_pixel(backend, device):
    x_adv, grad, x = images(device, EPS / 3)
    clean = pgd_step(x_adv, grad, x, eps=EPS, step_size=STEP)
    bad = torch.rand_like(x) < 0.3
    grad[bad] = torch.nan
    out = pgd_step(x_adv, grad, x, eps=EPS, step_size=STEP)
    still = pgd_step(x_adv, torch.zeros_like(grad), x, eps=EPS, step_size=STEP)
    assert torch.equal(out, torch.where(bad, still, clean))


def test_l2_a_nan_gradient_spoils_its_own_image_only(backend, device):
    x_adv, grad, x = images(device)
    clean = pgd_step(x_adv, grad, x, eps=0.5, step_size=0.1, norm="l2")
    grad[2, 0, 0, 0] = torch.nan
    out = pgd_step(x_adv, grad, x, eps=0.5, step_size=0.1, norm="l2")
    others = [0, 1, 3, 4]
    assert torch.equal(out[others], clean[others])


def test_l2_a_zero_gradient_only_projects(backend, device):
    _, _, x = images(device)
    x_adv = x + torch.randn_like(x)
    out = pgd_step(x_adv, torch.zeros_like(x), x, eps=0.5, step_size=0.1, norm="l2", clip=(-9, 9))
    delta = x_adv - x
    wanted = x + delta * (0.5 / delta.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-6)
    for eps in (0.5, 0.0):
        still = pgd_step(x, torch.zeros_like(x), x, eps=eps, step_size=0.1, norm="l2")
        assert torch.equal(still, x)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "adv_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_every_dtype(adv_dtype, grad_dtype, x_dtype, norm, backend, device):
    x_adv, grad, x = images(device)
    x = (x * 255).round().to(x_dtype) if x_dtype == torch.uint8 else x.to(x_dtype)
    x_adv, grad = x_adv.to(adv_dtype), grad.to(grad_dtype)

    def step() -> Tensor:
        return pgd_step(x_adv, grad, x, eps=0.1, step_size=0.05, norm=norm)

    dtypes = zip((adv_dtype, grad_dtype, x_dtype), SERVED.get(backend, ()), strict=False)
    if not all(dtype in served for dtype, served in dtypes):
        with pytest.raises(RtkError, match=f"forced backend '{backend}' cannot"):
            step()
        return
    exact = torch.promote_types(adv_dtype, torch.float32)
    origin = x.to(exact) / 255 if x_dtype == torch.uint8 else x.to(exact)
    formula = torchattacks_linf if norm == "linf" else torchattacks_l2
    wanted = formula(x_adv.to(exact), grad.to(exact), origin, 0.1, 0.05)
    out = step()
    assert out.dtype == adv_dtype
    if norm == "linf":
        assert torch.equal(out, wanted.to(adv_dtype))
    else:  # the norms may be summed in another order, which may round to the neighbour
        tolerance = {torch.bfloat16: 4e-3, torch.float16: 5e-4}.get(adv_dtype, 2e-7)
        torch.testing.assert_close(out.to(exact), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("adv_layout", LAYOUTS)
def test_every_layout(adv_layout, grad_layout, x_layout, backend, device):
    x_adv, grad, x = images(device)
    wanted = torchattacks_linf(x_adv, grad, x, EPS, STEP)
    layouts = LAYOUTS[adv_layout], LAYOUTS[grad_layout], LAYOUTS[x_layout]
    given = [layout(t) for layout, t in zip(layouts, (x_adv, grad, x), strict=True)]
    before = [t.clone() for t in given]
    out = pgd_step(*given, eps=EPS, step_size=STEP)
    assert torch.equal(out, wanted)
    format = torch.channels_last if adv_layout == "channels-last" else torch.contiguous_format
    assert out.stride() == torch.empty(x.shape).to(memory_format=format).stride()
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True)), "an input changed"


def test_the_step_requires_no_gradient(backend, device):
    x_adv, grad, x = images(device)
    out = pgd_step(x_adv.requires_grad_(), grad, x.requires_grad_(), eps=EPS, step_size=STEP)
    assert out.is_leaf
    assert not out.requires_grad


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(4, 5), (3, 2, 5), (2, 3, 2, 2, 5), (0, 3, 4, 4), (2, 0)])
def test_every_number_of_dimensions(shape, norm, backend, device):
    x = torch.rand(shape, device=device)
    grad = torch.randn_like(x)
    as_images = [t.reshape(shape[0], 1, 1, -1) if t.numel() else t for t in (x, grad, x)]
    out = pgd_step(x, grad, x, eps=0.1, step_size=0.3, norm=norm)
    wanted = pgd_step(*as_images, eps=0.1, step_size=0.3, norm=norm).reshape(shape)
    assert torch.equal(out, wanted)


X = torch.rand(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("given", "options", "words"),
    [
        ((X, X, X), {"eps": -0.1}, r"pgd_step: eps must be >= 0 in \[0, 1\] pixel scale, got -0.1"),
        ((X, X, X), {"eps": float("nan")}, "pgd_step: eps must be >= 0"),
        ((X, X, X), {"step_size": -1.0}, "pgd_step: step_size must be >= 0, got -1.0"),
        ((X, X, X), {"norm": "l_inf"}, "unknown norm for pgd_step 'l_inf'.*did you mean 'linf'"),
        ((X, X, X), {"norm": "L2"}, "unknown norm for pgd_step 'L2'.*did you mean 'l2'"),
        ((X, X, X), {"clip": (1.0, 0.0)}, r"clip must be \(low, high\), got \(1.0, 0.0\)"),
        ((X, X[:1], X), {}, r"grad and x must have one shape, got \(1, 3, 4, 4\) and"),
        ((X[:, :1], X, X), {}, r"x_adv and x must have one shape, got \(2, 1, 4, 4\)"),
        ((X, X.int(), X), {}, "grad must be floating, got torch.int32"),
        ((X.to(torch.uint8), X, X), {}, "x_adv must be floating, got torch.uint8"),
        ((X, X, X.int()), {}, "x must be floating or uint8, got torch.int32"),
        ((X[0, 0, 0],) * 3, {}, r"x must be \(N, ...\), got \(4,\)"),
        ((X, X.to("meta"), X), {}, "grad is on meta and x on cpu; move one"),
    ],
    ids=[
        "eps",
        "nan-eps",
        "step",
        "norm-linf",
        "norm-l2",
        "clip",
        "grad-shape",
        "x_adv-shape",
        "grad-int",
        "x_adv-uint8",
        "x-int",
        "1-D",
        "device",
    ],
)
def test_refused(given, options, words):
    with pytest.raises(RtkError, match=words):
        pgd_step(*given, **{"eps": EPS, "step_size": STEP} | options)
