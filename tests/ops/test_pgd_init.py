"""pgd_init: Philox's published vectors, one start everywhere, and the right distribution."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from rtk.errors import RtkError
from rtk.ops import backend as forced
from rtk.ops import pgd_init
from rtk.ops._philox import philox

OP = "pgd_init"
WIDE = (-100.0, 100.0)
WORD = 0xFFFFFFFF


def philox_block(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as Salmon et al. 2011 give it, in Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return c


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([WORD] * 4, [WORD] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_the_oracle_knows_the_vectors_of_random123(counter, key, words):
    assert " ".join(f"{word:08x}" for word in philox_block(counter, key)) == words


@pytest.mark.parametrize("stream", [0, 1, 2, WORD])
@pytest.mark.parametrize("seed", [0, 1, WORD, 2**32, 0x299F31D0A4093822, 2**63 - 1], ids=hex)
def test_philox(seed, stream, device):
    words = philox(18, seed, stream, torch.device(device)).tolist()
    key = [seed & WORD, seed >> 32]
    wanted = [w for block in range(5) for w in philox_block([block, 0, stream, 0], key)]
    assert words == wanted[:18]


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 1, 2**63 - 1], ids=hex)
def test_linf_is_philox_in_the_order_of_the_pixels(seed, backend, device):
    x = torch.rand(3, 2, 5, 7)
    key = [seed & WORD, seed >> 32]
    words = [w for block in range(-(-x.numel() // 4)) for w in philox_block([block, 0, 0, 0], key)]
    uniform = torch.tensor([w >> 8 for w in words[: x.numel()]]).float() * 2.0**-24
    wanted = (x + ((uniform * 2 - 1) * 0.3).reshape(x.shape)).clamp(0, 1)
    out = pgd_init(x.to(device), eps=0.3, seed=seed)
    assert torch.equal(out.cpu(), wanted)


@pytest.mark.parametrize("seed", [0, 2**63 - 1], ids=hex)
@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (40, 3, 32, 31), (5, 11), (4, 2, 9)], ids=str)
def test_l2_is_the_references(shape, seed, backend, device, two_threads):
    x = torch.rand(shape)
    with forced("reference"):
        wanted = pgd_init(x, eps=0.5, norm="l2", seed=seed)
    out = pgd_init(x.to(device), eps=0.5, norm="l2", seed=seed)
    torch.testing.assert_close(out.cpu(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: t.repeat_interleave(2, 1)[:, ::2],
    ],
    ids=["channels-last", "transposed", "every-second"],
)
def test_one_seed_gives_one_start_in_every_layout(layout, norm, backend, device):
    x = torch.rand(3, 2, 5, 7, device=device)
    start = pgd_init(x, eps=0.3, norm=norm, seed=5)
    other = pgd_init(layout(x), eps=0.3, norm=norm, seed=5)
    torch.testing.assert_close(other, start, rtol=0, atol=0 if norm == "linf" else 1e-6)
    is_last = layout(x).is_contiguous(memory_format=torch.channels_last)
    assert other.is_contiguous(memory_format=torch.channels_last) == is_last


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_one_thread_and_two_agree_and_other_seeds_differ(norm, backend, device):
    x = torch.rand(40, 3, 33, 32, device=device)
    alone = pgd_init(x, eps=0.3, norm=norm, seed=5)
    torch.set_num_threads(2)
    assert torch.equal(pgd_init(x, eps=0.3, norm=norm, seed=5), alone)
    for seed in (4, 6, 5 + 2**32):
        assert (pgd_init(x, eps=0.3, norm=norm, seed=seed) == alone).float().mean() < 0.2


def test_linf_is_uniform(backend, device):
    x = torch.full((8, 3, 64, 64), 0.5, device=device)
    noise = ((pgd_init(x, eps=0.25, seed=11) - x) / 0.25).cpu().double()
    assert noise.abs().max() <= 1
    assert stats.kstest(noise.flatten(), stats.uniform(-1, 2).cdf).pvalue > 0.01
    between_neighbours = torch.corrcoef(torch.stack([noise[..., :-1], noise[..., 1:]]).flatten(1))
    assert between_neighbours[0, 1].abs() < 0.02


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 1, 2), (3, 32, 32)], ids=str)
def test_l2_is_uniform_in_the_ball(shape, backend, device):
    n = 3000 if shape[-1] < 32 else 300
    x = torch.full((n, *shape), 0.5, device=device)
    delta = (pgd_init(x, eps=2.0, norm="l2", clip=WIDE, seed=3) - x).cpu().double().flatten(1)
    d = delta.shape[1]
    radius = delta.norm(dim=1)
    assert radius.max() <= 2.0 * (1 + 1e-6)
    assert stats.kstest((radius / 2.0) ** d, "uniform").pvalue > 0.01
    direction = delta / radius[:, None]
    # n d |mean direction|^2 is chi-squared with d degrees of freedom, squared coordinates are Beta.
    assert stats.chi2(d).sf(n * d * direction.mean(0).square().sum().item()) > 0.01
    assert stats.kstest(direction[:, 0] ** 2, stats.beta(0.5, (d - 1) / 2).cdf).pvalue > 0.01
    assert stats.kstest(direction[:, -1] ** 2, stats.beta(0.5, (d - 1) / 2).cdf).pvalue > 0.01


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("clip", [(0.0, 1.0), (0.3, 0.6)], ids=str)
def test_in_the_ball_and_in_the_range(clip, norm, backend, device):
    x = torch.rand(4, 3, 8, 8, device=device).clamp(*clip)
    out = pgd_init(x, eps=0.4, norm=norm, clip=clip, seed=1)
    assert torch.equal(out.clamp(*clip), out)
    delta = (out - x).double().flatten(1)
    size = delta.abs().max() if norm == "linf" else delta.norm(dim=1).max()
    assert 0.1 < size <= 0.4 + 1e-6
    assert torch.equal(pgd_init(x, eps=0.0, norm=norm, clip=clip, seed=1), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_every_dtype(norm, dtype, backend, device):
    x = torch.rand(3, 2, 5, 7, device=device)
    x = (x * 255).round().to(dtype) if dtype == torch.uint8 else x.to(dtype)
    # On the CPU: a GPU multiplies by the inverse of a number, which rounds otherwise.
    pixels = (x.cpu().float() / 255).to(device) if dtype == torch.uint8 else x.float()
    out = pgd_init(x, eps=0.3, norm=norm, seed=9)
    wanted = pgd_init(pixels, eps=0.3, norm=norm, seed=9)
    assert out.dtype == (torch.float32 if dtype == torch.uint8 else dtype)
    torch.testing.assert_close(out, wanted.to(out.dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_the_cpu_backend_refuses_what_the_reference_takes(dtype):
    x = torch.rand(2, 3, 4, 4).to(dtype)
    wanted = pgd_init(x.float(), eps=0.3, seed=9)
    torch.testing.assert_close(pgd_init(x, eps=0.3, seed=9).float(), wanted, rtol=0, atol=5e-4)
    with forced("cpu"), pytest.raises(RtkError, match=r"forced backend 'cpu' cannot.*x is"):
        pgd_init(x, eps=0.3, seed=9)


def test_the_start_requires_no_gradient(backend, device):
    out = pgd_init(torch.rand(2, 3, 4, 4, device=device, requires_grad=True), eps=0.1, seed=0)
    assert out.is_leaf
    assert not out.requires_grad


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0)], ids=str)
def test_no_pixels(shape, norm, backend, device):
    x = torch.rand(shape, device=device)
    assert torch.equal(pgd_init(x, eps=0.1, norm=norm, seed=0), x)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2**40 + 7, 2**63 - 1], ids=hex)
def test_a_seed_in_memory_is_the_seed(seed, shape, norm, backend, device):
    x = torch.rand(3, 2, 5, 7, device=device)
    wanted = pgd_init(x, eps=0.3, norm=norm, seed=seed)
    in_memory = torch.full(shape, seed, device=device)
    assert torch.equal(pgd_init(x, eps=0.3, norm=norm, seed=in_memory), wanted)


def test_a_negative_seed_in_memory_counts_as_its_bits(backend, device):
    x = torch.rand(3, 2, 5, 7, device=device)
    out = pgd_init(x, eps=0.3, seed=torch.tensor(-5, device=device))
    with forced("reference"):
        wanted = pgd_init(x.cpu(), eps=0.3, seed=torch.tensor(-5))
    assert torch.equal(out.cpu(), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_every_replay_of_a_graph_reads_the_seed_anew(norm):
    x = torch.rand(5, 3, 9, 7, device="cuda")
    seed = torch.tensor([4], device="cuda")
    pgd_init(x, eps=0.3, norm=norm, seed=seed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        start = pgd_init(x, eps=0.3, norm=norm, seed=seed)
        seed += 1
    for number in range(4, 7):
        graph.replay()
        assert torch.equal(start, pgd_init(x, eps=0.3, norm=norm, seed=number))


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(3, 3, 299, 299), (2, 3, 224, 224), (700, 1, 3, 3)], ids=str)
def test_many_programs_on_a_gpu(shape, layout, norm):
    x = torch.rand(shape, device="cuda").contiguous(memory_format=layout)
    with forced("triton"):
        out = pgd_init(x, eps=0.3, norm=norm, seed=8)
    with forced("reference"):
        wanted = pgd_init(x, eps=0.3, norm=norm, seed=8)
    torch.testing.assert_close(out, wanted, rtol=0, atol=0 if norm == "linf" else 1e-6)
    assert out.stride() == wanted.stride()


INTERPRETED = """
import torch
from rtk.ops._registry import ops

run = {i.backend: i.run for i in ops["pgd_init"].implementations}
ball = dict(eps=0.3, clip_min=0.0, clip_max=1.0)
for shape in [(5, 3, 9, 7), (2, 3, 32, 32), (3, 5), (1, 1)]:
    for seed, in_memory in [(0, None), (2**63 - 1, None), (0, torch.tensor([2**40 + 7]))]:
        for norm, tolerance in [("linf", 0), ("l2", 1e-6)]:
            for bytes_ in (False, True):
                x = torch.rand(shape)
                x = (x * 255).round().to(torch.uint8) if bytes_ else x
                x_last = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
                for given in (x, x_last):
                    arguments = (given, in_memory), dict(norm=norm, seed=seed, **ball)
                    out = run["triton"](*arguments[0], **arguments[1])
                    wanted = run["reference"](*arguments[0], **arguments[1])
                    torch.testing.assert_close(out, wanted, rtol=0, atol=tolerance)
                    assert out.stride() == wanted.stride()
"""


def test_the_triton_kernels_under_the_interpreter(interpret):
    interpret(INTERPRETED)


def test_the_triton_kernel_moves_16_bytes_a_thread(compile_for_hopper):
    from rtk.kernels.pgd_init import pgd_init_linf

    types = {"x_ptr": "*fp32", "out_ptr": "*fp32", "seed": "i64"}
    types |= dict.fromkeys(("tiles", "count", "rows", "columns"), "i32")
    types |= dict.fromkeys(("eps", "low", "high"), "fp32")
    constants = {"SEED_IN_MEMORY": False, "TRANSPOSED": False, "BLOCKS": 256}
    built = compile_for_hopper(
        pgd_init_linf, types, constants, ("count",), num_warps=8, enable_fp_fusion=False
    )
    assert built.accesses() == ["ld.v4.b32", "st.v4.b32"]
    assert built.resources["LOCAL"] == built.resources["STACK"] == built.resources["SHARED"] == 0
    assert "fma.rn.f32" not in built.ptx


X = torch.rand(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("x", "options", "words"),
    [
        (X, {"eps": -0.1}, r"pgd_init: eps must be >= 0 in \[0, 1\] pixel scale, got -0.1"),
        (X, {"norm": "l3"}, "unknown norm for pgd_init 'l3'.*did you mean 'l2'"),
        (X, {"clip": (0.5, 0.4)}, r"pgd_init: clip must be \(low, high\)"),
        (X, {"seed": -1}, r"pgd_init: seed must be in \[0, 2\*\*63\), got -1"),
        (X, {"seed": 2**63}, "pgd_init: seed must be in"),
        (X, {"seed": torch.zeros(2).long()}, r"seed in memory must be one int64, got \(2,\) of"),
        (X, {"seed": torch.tensor(1.0)}, "pgd_init: a seed in memory must be one int64"),
        (X, {"seed": torch.tensor(1, device="meta")}, "pgd_init: seed is on meta and x on cpu"),
        (X.int(), {}, "pgd_init: x must be floating or uint8, got torch.int32"),
        (X[0, 0, 0], {}, r"pgd_init: x must be \(N, ...\), got \(4,\)"),
        (X[None], {}, "pgd_init: x must have up to 4 dimensions"),
    ],
    ids=[
        "eps",
        "norm",
        "clip",
        "seed-negative",
        "seed-large",
        "seeds",
        "seed-float",
        "seed-device",
        "int",
        "1-D",
        "5-D",
    ],
)
def test_refused(x, options, words):
    with pytest.raises(RtkError, match=words):
        pgd_init(x, **{"eps": 0.1, "seed": 0} | options)
