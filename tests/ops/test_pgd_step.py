"""pgd_step: torchattacks' update line by line, and what must hold of every step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rtk.errors import RtkError
from rtk.ops import backend as forced
from rtk.ops import pgd_step

OP = "pgd_step"
EPS, STEP = 8 / 255, 2 / 255
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels-last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "every-second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
}
# (x_adv, grad, x) that a backend takes; one not named takes all
ON_GPU = (
    {torch.float32, torch.bfloat16},
    {torch.float32, torch.bfloat16, torch.float16},
    {torch.float32, torch.bfloat16, torch.uint8},
)
SERVED = {
    "cpu": (*ON_GPU[:2], {torch.float32, torch.uint8}),
    "triton": ON_GPU,
    "cuda": ON_GPU,
}
NORMS = {"triton": "linf", "cuda": "l2"}  # the only one that the backend takes


@pytest.fixture(autouse=True)
def _only_the_norm_that_is_served(request):
    given = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    norm = given.get("norm", "l2" if "_l2_" in request.node.name else "linf")
    if NORMS.get(given.get("backend"), norm) != norm:
        pytest.skip(f"the backend {given['backend']} takes the other norm")


def torchattacks_linf(adv_images, grad, images, eps, alpha):
    """The loop body of torchattacks 3.5.1's PGD."""
    adv_images = adv_images.detach() + alpha * grad.sign()
    delta = torch.clamp(adv_images - images, min=-eps, max=eps)
    return torch.clamp(images + delta, min=0, max=1).detach()


def torchattacks_l2(adv_images, grad, images, eps, alpha):
    """The loop body of torchattacks 3.5.1's PGDL2, with `reshape` for `view`: in any layout."""
    batch_size = len(images)
    grad_norms = torch.norm(grad.reshape(batch_size, -1), p=2, dim=1) + 1e-10
    grad = grad / grad_norms.view(batch_size, 1, 1, 1)
    adv_images = adv_images.detach() + alpha * grad
    delta = adv_images - images
    delta_norms = torch.norm(delta.reshape(batch_size, -1), p=2, dim=1)
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
    # On the CPU: a GPU multiplies by the inverse of a number, which rounds otherwise.
    origin = (x.cpu().to(exact) / 255).to(device) if x_dtype == torch.uint8 else x.to(exact)
    formula = torchattacks_linf if norm == "linf" else torchattacks_l2
    wanted = formula(x_adv.to(exact), grad.to(exact), origin, 0.1, 0.05)
    out = step()
    assert out.dtype == adv_dtype
    if norm == "linf":
        assert torch.equal(out, wanted.to(adv_dtype))
    else:  # the norms may be summed in another order, which may round to the neighbour
        tolerance = {torch.bfloat16: 4e-3, torch.float16: 5e-4}.get(adv_dtype, 2e-7)
        torch.testing.assert_close(out.to(exact), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("adv_layout", LAYOUTS)
def test_every_layout(adv_layout, grad_layout, x_layout, norm, backend, device):
    x_adv, grad, x = images(device)
    formula = torchattacks_linf if norm == "linf" else torchattacks_l2
    wanted = formula(x_adv, grad, x, EPS, STEP)
    layouts = LAYOUTS[adv_layout], LAYOUTS[grad_layout], LAYOUTS[x_layout]
    given = [layout(t) for layout, t in zip(layouts, (x_adv, grad, x), strict=True)]
    before = [t.clone() for t in given]
    out = pgd_step(*given, eps=EPS, step_size=STEP, norm=norm)
    torch.testing.assert_close(out, wanted, rtol=0, atol=0 if norm == "linf" else 2e-7)
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


# What the kernel does with an image: in one block's shared memory or in that of up to eight, too
# large for any, too odd to take four pixels at once or just too odd for eight; and so many images
# that a block, or a cluster of eight, takes several.
SIZES = {
    "one-block": (200, 3, 32, 32),
    "few-blocks": (5, 3, 64, 64),
    "eight-blocks": (2, 3, 224, 224),
    "parts-uneven": (3, 3, 100, 132),
    "too-large": (2, 3, 600, 600),
    "too-odd": (2, 3, 299, 299),
    "fours": (5, 3, 50, 50),
    "tiny": (3, 1, 2, 2),
    "many": (3000, 3, 16, 16),
    "many-for-eight": (40, 3, 160, 160),
}


def l2_in_double(x_adv, grad, x, eps, step):
    origin = x.double() / 255 if x.dtype == torch.uint8 else x.double()
    return torchattacks_l2(x_adv.double(), grad.double().contiguous(), origin, eps, step)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("dtypes", ["f32 f32 f32", "f32 bf16 u8", "bf16 bf16 u8", "bf16 f16 bf16"])
@pytest.mark.parametrize("size", SIZES)
def test_l2_every_size_on_a_gpu(size, dtypes, layout):
    types = {
        "f32": torch.float32,
        "bf16": torch.bfloat16,
        "f16": torch.float16,
        "u8": torch.uint8,
    }
    adv_dtype, grad_dtype, x_dtype = (types[name] for name in dtypes.split())
    x = torch.rand(SIZES[size], device="cuda")
    x_adv = (x + 0.01 * torch.randn_like(x)).clamp(0, 1)
    x = (x * 255).round().to(x_dtype) if x_dtype == torch.uint8 else x.to(x_dtype)
    given = [x_adv.to(adv_dtype), torch.randn_like(x_adv).to(grad_dtype), x]
    x_adv, grad, x = (LAYOUTS[layout](t) for t in given)
    for eps, step in [(0.5, 0.1), (100.0, 5.0)]:
        with forced("cuda"):
            out = pgd_step(x_adv, grad, x, eps=eps, step_size=step, norm="l2")
            again = pgd_step(x_adv, grad, x, eps=eps, step_size=step, norm="l2")
        assert torch.equal(out, again)
        assert out.stride() == x_adv.stride()
        wanted = l2_in_double(x_adv, grad, x, eps, step)
        tolerance = 4e-3 if adv_dtype == torch.bfloat16 else 4e-7
        torch.testing.assert_close(out.double(), wanted, rtol=0, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("size", ["one-block", "eight-blocks", "too-large", "many-for-eight"])
def test_l2_a_step_back_to_the_origin_on_a_gpu(size):
    """Offset and step cancel to 1/1000 in one image; the others keep to the short way."""
    x = torch.rand(SIZES[size], device="cuda") * 0.5 + 0.25
    away = torch.randn_like(x)
    away *= (3 / away.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    x_adv, grad = x + away, torch.randn_like(x)
    grad[1] = -away[1]
    with forced("cuda"):
        out = pgd_step(x_adv, grad, x, eps=1e-3, step_size=2.997, norm="l2", clip=(-9, 9))
    wanted = torchattacks_l2(x_adv, grad, x, 1e-3, 2.997)
    torch.testing.assert_close(out, wanted, rtol=0, atol=3e-7)
    assert (out - x).flatten(1).norm(dim=1).max() < 1.3e-3


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shift", [1, 2, 3, 4])
def test_addresses_that_are_not_aligned_on_a_gpu(shift, norm):
    x_adv, grad, x = (
        torch.rand(3 * 64 + shift, device="cuda")[shift:].view(3, 1, 8, 8) for _ in range(3)
    )
    formula = torchattacks_linf if norm == "linf" else torchattacks_l2
    for given in [(x_adv, grad, x), (x_adv, grad.clone(), x), (x_adv.clone(), grad, x.clone())]:
        out = pgd_step(*given, eps=0.1, step_size=0.3, norm=norm)
        atol = 0 if norm == "linf" else 3e-7
        torch.testing.assert_close(out, formula(*given, 0.1, 0.3), rtol=0, atol=atol)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_beyond_two_to_the_31_pixels_on_a_gpu(norm):
    """21 GB: bf16 images and gradients, uint8 origins; the last images are looked at."""
    n, shape = 14300, (3, 224, 224)
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    x = torch.full((n, *shape), 100, dtype=torch.uint8, device="cuda")
    x_adv = torch.full((n, *shape), 0.5, dtype=torch.bfloat16, device="cuda")
    grad = torch.ones((n, *shape), dtype=torch.bfloat16, device="cuda")
    x[-2:] = torch.randint(256, (2, *shape), device="cuda").to(torch.uint8)
    grad[-2:] = torch.randn(2, *shape, device="cuda").bfloat16()
    assert x.numel() > 2**31
    out = pgd_step(x_adv, grad, x, eps=0.1, step_size=0.05, norm=norm)
    wanted = pgd_step(x_adv[-3:], grad[-3:], x[-3:], eps=0.1, step_size=0.05, norm=norm)
    assert torch.equal(out[-3:], wanted)


@pytest.mark.parametrize(("backend_name", "norm"), [("triton", "l2"), ("cuda", "linf")])
def test_a_norm_that_a_backend_does_not_take(backend_name, norm):
    with (
        forced(backend_name),
        pytest.raises(RtkError, match=f"'{backend_name}' cannot: it takes the .*, not {norm}"),
    ):
        pgd_step(X, X, X, eps=0.1, step_size=0.1, norm=norm)


INTERPRETED = """
import itertools
import torch
from rtk.ops._registry import ops

run = {i.backend: i.run for i in ops["pgd_step"].implementations}
numbers = dict(eps=8 / 255, step_size=2 / 255, norm="linf", clip_min=0.0, clip_max=1.0)
formats = torch.contiguous_format, torch.channels_last
for shape in [(5, 3, 9, 7), (2, 3, 32, 32), (1, 1, 1, 1)]:
    for bytes_, *order in itertools.product([False, True], formats, formats, formats):
        x = torch.rand(shape)
        x_adv, grad = (x + 0.1 * torch.randn(shape)).clamp(0, 1), torch.randn(shape)
        grad[:, :, 0] = 0
        grad[0, 0, 0, 0] = torch.nan
        x = (x * 255).round().to(torch.uint8) if bytes_ else x
        given = [t.contiguous(memory_format=f) for t, f in zip((x_adv, grad, x), order)]
        out, wanted = (run[name](*given, **numbers) for name in ("triton", "reference"))
        assert torch.equal(out, wanted), (shape, bytes_, order)
        assert out.stride() == wanted.stride()
x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
same = run["triton"](torch.zeros(x.shape), torch.zeros(x.shape), x, **numbers | {"eps": 0.0})
assert torch.equal(same, x.float() / 255)
"""


def test_the_triton_kernel_under_the_interpreter(interpret):
    interpret(INTERPRETED)


@pytest.mark.parametrize(
    ("types", "accesses"),
    [
        ("fp32 fp32 fp32", ["ld.v4.b32"] * 3 + ["st.v4.b32"]),
        ("fp32 bf16 u8", ["ld.b32", "ld.v2.b32", "ld.v4.b32", "st.v4.b32"]),
        ("bf16 bf16 u8", ["ld.v2.b32", "ld.v4.b32", "ld.v4.b32", "st.v4.b32"]),
    ],
    ids=["fp32", "compact", "bf16"],
)
def test_the_triton_kernel_moves_16_bytes_a_thread(types, accesses, compile_for_hopper):
    from rtk.kernels.pgd_step import pgd_step_linf

    x_adv, grad, x = (f"*{name}" for name in types.split())
    pointers = {"x_adv_ptr": x_adv, "grad_ptr": grad, "x_ptr": x, "out_ptr": x_adv}
    numbers = dict.fromkeys(("tiles", "count", "rows", "columns"), "i32")
    numbers |= dict.fromkeys(("step_size", "eps", "low", "high"), "fp32")
    width = 4 if "fp32" in types else 8
    constants = {"GRAD_TRANSPOSED": False, "X_TRANSPOSED": False, "BLOCK": 256 * width}
    built = compile_for_hopper(
        pgd_step_linf,
        pointers | numbers,
        constants,
        ("count",),
        num_warps=8,
        enable_fp_fusion=False,
    )
    assert built.accesses() == accesses
    assert built.resources["LOCAL"] == built.resources["STACK"] == built.resources["SHARED"] == 0
    assert built.resources["REG"] <= 32
    assert "fma.rn.f32" not in built.ptx


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
