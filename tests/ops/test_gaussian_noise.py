"""gaussian_noise: Box and Muller's formula, one noise everywhere, and the right distribution."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from rtk.errors import RtkError
from rtk.ops import backend as forced
from rtk.ops import gaussian_noise
from rtk.ops._philox import philox

OP = "gaussian_noise"
CPU = torch.device("cpu")
LAYOUTS = {
    "channels-last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "every-second": lambda t: t.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 1, 2**63 - 1], ids=hex)
@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (2, 3, 32, 31), (5, 11), (4, 2, 9), (1, 1)])
def test_it_is_the_formula_of_box_and_muller(shape, seed, backend, device):
    x = torch.rand(shape)
    first, second = (philox(x.numel(), seed, stream, CPU).tolist() for stream in (0, 1))
    normals = [
        math.sqrt(-2 * math.log(((a >> 8) + 1) / 2**24)) * math.cos(math.tau * (b >> 8) / 2**24)
        for a, b in zip(first, second, strict=True)
    ]
    wanted = x.double() + 0.5 * torch.tensor(normals, dtype=torch.float64).view(shape)
    out = gaussian_noise(x.to(device), sigma=0.5, seed=seed)
    torch.testing.assert_close(out.cpu().double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_every_dtype(dtype, out_dtype, backend, device):
    pixels = torch.rand(3, 2, 5, 7, device=device)
    x = (pixels * 255).round().to(dtype) if dtype == torch.uint8 else pixels.to(dtype)
    # On the CPU: a GPU multiplies by the inverse of a number, which rounds otherwise.
    pixels = (x.cpu().float() / 255).to(device) if dtype == torch.uint8 else x.float()
    out = gaussian_noise(x, sigma=0.3, seed=9, dtype=out_dtype)
    assert out.dtype == (out_dtype or (torch.float32 if dtype == torch.uint8 else dtype))
    wanted = gaussian_noise(pixels, sigma=0.3, seed=9)
    atol = 1e-2 if out.dtype == torch.bfloat16 else 2e-7
    torch.testing.assert_close(out.float(), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_the_reference_takes_what_the_gpu_does_not(dtype, device):
    x = torch.rand(2, 3, 4, 4, device=device).to(dtype)
    out = gaussian_noise(x, sigma=0.3, seed=9)
    assert out.dtype == dtype
    wanted = gaussian_noise(x.float(), sigma=0.3, seed=9)
    torch.testing.assert_close(out.float(), wanted, rtol=0, atol=1e-3)
    with forced("triton"), pytest.raises(RtkError, match="forced backend 'triton' cannot"):
        gaussian_noise(x, sigma=0.3, seed=9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_seed_gives_one_noise_in_every_layout(layout, backend, device):
    x = torch.rand(3, 2, 5, 7, device=device)
    wanted = gaussian_noise(x, sigma=0.3, seed=5)
    other = LAYOUTS[layout](x)
    before = other.clone()
    out = gaussian_noise(other, sigma=0.3, seed=5)
    torch.testing.assert_close(out, wanted, rtol=0, atol=2e-7)
    assert torch.equal(other, before)
    is_last = layout == "channels-last"
    assert out.is_contiguous(memory_format=torch.channels_last) == is_last


def test_it_is_normal_and_uncorrelated(backend, device):
    x = torch.full((24, 3, 64, 64), 0.5, device=device)
    noise = ((gaussian_noise(x, sigma=0.25, seed=11) - x) / 0.25).cpu().double()
    count = noise.numel()
    assert stats.kstest(noise.flatten(), "norm").pvalue > 0.01
    assert abs(noise.mean()) < 4 / count**0.5
    assert abs(noise.square().mean() - 1) < 4 * (2 / count) ** 0.5
    assert abs(noise.pow(4).mean() - 3) < 4 * (96 / count) ** 0.5
    assert noise.abs().max() > 4  # the tails are there
    other = ((gaussian_noise(x, sigma=0.25, seed=12) - x) / 0.25).cpu().double()
    pairs = {
        "pixels": (noise[..., :-1], noise[..., 1:]),
        "rows": (noise[..., :-1, :], noise[..., 1:, :]),
        "channels": (noise[:, :-1], noise[:, 1:]),
        "images": (noise[:-1], noise[1:]),
        "seeds": (noise, other),
        "squares": (noise[..., :-1].square() - 1, (noise[..., 1:].square() - 1) / 2),
    }
    for name, (a, b) in pairs.items():
        assert abs((a * b).mean()) < 4.5 / a.numel() ** 0.5, name


def test_no_noise_and_pixels_that_leave_the_range(backend, device):
    x = torch.rand(4, 3, 8, 8, device=device)
    assert torch.equal(gaussian_noise(x, sigma=0.0, seed=1), x)
    out = gaussian_noise(x, sigma=2.0, seed=1)
    assert out.min() < -1 and out.max() > 2


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1], ids=hex)
def test_a_seed_in_memory_is_the_seed(seed, shape, backend, device):
    x = torch.rand(3, 2, 5, 7, device=device)
    wanted = gaussian_noise(x, sigma=0.3, seed=seed)
    in_memory = torch.full(shape, seed, device=device)
    assert torch.equal(gaussian_noise(x, sigma=0.3, seed=in_memory), wanted)


@pytest.mark.gpu
def test_every_replay_of_a_graph_reads_the_seed_anew():
    x = torch.rand(5, 3, 9, 7, device="cuda")
    seed = torch.tensor(4, device="cuda")
    gaussian_noise(x, sigma=0.3, seed=seed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        noisy = gaussian_noise(x, sigma=0.3, seed=seed)
        seed += 1
    for number in range(4, 7):
        graph.replay()
        assert torch.equal(noisy, gaussian_noise(x, sigma=0.3, seed=number))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(3, 3, 299, 299), (2, 3, 224, 224), (700, 1, 3, 3)], ids=str)
def test_many_programs_on_a_gpu(shape, layout):
    x = torch.rand(shape, device="cuda").contiguous(memory_format=layout)
    with forced("triton"):
        out = gaussian_noise(x, sigma=1.0, seed=8)
    with forced("reference"):
        wanted = gaussian_noise(x, sigma=1.0, seed=8)
    torch.testing.assert_close(out, wanted, rtol=0, atol=3e-6)


def test_the_noise_requires_no_gradient(backend, device):
    x = torch.rand(2, 3, 4, 4, device=device, requires_grad=True)
    out = gaussian_noise(x, sigma=0.1, seed=0)
    assert out.is_leaf
    assert not out.requires_grad


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0)], ids=str)
def test_no_pixels(shape, backend, device):
    x = torch.rand(shape, device=device)
    assert torch.equal(gaussian_noise(x, sigma=0.1, seed=0), x)


INTERPRETED = """
import torch
from rtk.ops._registry import ops

run = {i.backend: i.run for i in ops["gaussian_noise"].implementations}
for shape in [(5, 3, 9, 7), (2, 3, 32, 32), (3, 5), (1, 1)]:
    for seed, in_memory in [(0, None), (2**63 - 1, None), (0, torch.tensor([2**40 + 7]))]:
        for bytes_ in (False, True):
            x = torch.rand(shape)
            x = (x * 255).round().to(torch.uint8) if bytes_ else x
            x_last = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
            for given in (x, x_last):
                options = dict(sigma=1.0, dtype=torch.float32, seed=seed)
                out, wanted = (run[b](given, in_memory, **options) for b in ("triton", "reference"))
                torch.testing.assert_close(out, wanted, rtol=0, atol=3e-6)
                assert out.stride() == wanted.stride()
"""


def test_the_triton_kernel_under_the_interpreter(interpret):
    interpret(INTERPRETED)


def test_the_triton_kernel_moves_16_bytes_a_thread(compile_for_hopper):
    from rtk.kernels.gaussian_noise import gaussian_noise as kernel

    types = {"x_ptr": "*fp32", "out_ptr": "*fp32", "seed": "*i64", "sigma": "fp32"}
    types |= dict.fromkeys(("tiles", "count", "rows", "columns"), "i32")
    constants = {"SEED_IN_MEMORY": True, "TRANSPOSED": False, "BLOCKS": 256}
    built = compile_for_hopper(kernel, types, constants, ("count",), num_warps=8)
    assert built.accesses() == ["ld.b64", "ld.v4.b32", "st.v4.b32"]  # b64: the seed
    assert built.resources["LOCAL"] == built.resources["STACK"] == built.resources["SHARED"] == 0


X = torch.rand(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("x", "options", "words"),
    [
        (X, {"sigma": -0.1}, r"sigma must be >= 0 in \[0, 1\] pixel scale, got -0.1"),
        (X, {"sigma": math.nan}, "gaussian_noise: sigma must be >= 0"),
        (X, {"seed": -1}, r"gaussian_noise: seed must be in \[0, 2\*\*63\), got -1"),
        (X, {"seed": torch.zeros(2).long()}, "gaussian_noise: a seed in memory must be one int64"),
        (X, {"seed": torch.tensor(1, device="meta")}, "seed is on meta and x on cpu; move one"),
        (X, {"dtype": torch.uint8}, "dtype must be floating, got torch.uint8"),
        (X.int(), {"dtype": torch.float32}, "x must be floating or uint8, got torch.int32"),
        (X[0, 0, 0], {}, r"gaussian_noise: x must be \(N, ...\), got \(4,\)"),
        (X[None], {}, "gaussian_noise: x must have up to 4 dimensions"),
    ],
    ids=["sigma", "nan", "seed", "seeds", "seed-device", "dtype", "int", "1-D", "5-D"],
)
def test_refused(x, options, words):
    with pytest.raises(RtkError, match=words):
        gaussian_noise(x, **{"sigma": 0.1, "seed": 0} | options)
