"""live_tiles: a bit a block of weights, as a plain loop finds them; fused_conv2d skips by them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rtk.errors import RtkError
from rtk.ops import backend as forced
from rtk.ops import fused_conv2d, fused_conv2d_bwd_input, live_tiles, turn_filter
from rtk.ops._conv_tiles import Problem, candidates, guess
from rtk.ops._fused_conv2d_cuda import problem_of
from rtk.ops._registry import ops

OP = "live_tiles"
LAST = torch.channels_last
SHAPES = [(64, 64, 3, 3), (130, 200, 3, 2), (1, 1, 1, 1), (70, 4096, 1, 1), (64, 136, 7, 7)]
DTYPES = [torch.bool, torch.bfloat16, torch.float16, torch.float32, torch.float64]


def blocks(shape: tuple[int, ...], density: float) -> Tensor:
    """Return a mask (K, C, R, S) of whole blocks."""
    k, c, r, s = shape
    live = torch.rand(-(-k // 64), -(-c // 64), r, s) < density
    return live.repeat_interleave(64, 0).repeat_interleave(64, 1)[:k, :c]


def loop(weight: Tensor) -> list[list[int]]:
    """Return the words as numbers below 2**64."""
    k, c, r, s = weight.shape
    words = []
    for k_first in range(0, k, 64):
        row = []
        for tap in itertools.product(range(r), range(s)):
            block = weight[(slice(k_first, k_first + 64), slice(None), *tap)]
            row.append(sum(1 << j for j in range(-(-c // 64)) if block[:, 64 * j :][:, :64].any()))
        words.append(row)
    return words


def as_numbers(words: Tensor) -> list[list[int]]:
    return [[word % 2**64 for word in row] for row in words.tolist()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_words_are_a_plain_loops(shape, dtype, backend, device):
    one_a_block = torch.rand(shape) < 2 / 64**2
    for mask in (blocks(shape, 0.3), one_a_block, torch.zeros(shape), torch.ones(shape)):
        weight = (mask * (torch.rand(shape) + 1)).to(device, dtype)
        wanted = loop(mask)
        layouts = [weight.contiguous(), weight.contiguous(memory_format=LAST)]
        layouts.append(weight.repeat_interleave(2, 1)[:, ::2])
        for given in layouts:
            words = live_tiles(given)
            assert words.dtype == torch.int64 and words.is_contiguous()
            assert as_numbers(words) == wanted


def test_nan_lives_and_minus_zero_does_not(backend, device):
    for dtype in DTYPES[1:]:
        weight = torch.zeros(64, 192, 1, 1)
        weight[3, 5], weight[4, 70], weight[63, 191] = -0.0, torch.nan, 1e-7
        assert as_numbers(live_tiles(weight.to(device, dtype))) == [[0b110]]


def test_a_mask_that_is_broadcast(backend, device):
    rows = (torch.arange(128) >= 64).view(128, 1, 1, 1).to(device)
    assert as_numbers(live_tiles(rows.expand(128, 100, 1, 2))) == [[0, 0], [3, 3]]


def test_opcheck_and_no_gradient(backend, device):
    weight = torch.randn(70, 65, 2, 3, device=device, requires_grad=True)
    torch.library.opcheck(ops[OP].overload, (weight,))
    assert not live_tiles(weight).requires_grad


def test_one_compiled_graph():
    weight = blocks((130, 70, 3, 3), 0.5) * 1.0
    compiled = torch.compile(live_tiles, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weight), live_tiles(weight))


@pytest.mark.gpu
def test_a_graph_follows_the_mask():
    weight = (blocks((128, 256, 3, 3), 0.5) * 1.0).cuda().bfloat16()
    x = torch.randn(4, 256, 7, 7, device="cuda").bfloat16().contiguous(memory_format=LAST)

    def call() -> tuple[Tensor, Tensor]:
        live = live_tiles(weight)
        return live, fused_conv2d(x, weight, None, None, None, live, padding=1)

    with forced("cuda"):
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        for density in (0.1, 0.0, 1.0):
            weight.copy_(blocks(tuple(weight.shape), density))
            graph.replay()
            with forced("reference"):
                wanted = call()
            assert torch.equal(captured[0], wanted[0])
            torch.testing.assert_close(captured[1], wanted[1], rtol=2.0**-7, atol=1e-2)


def test_fused_conv2d_with_live_is_the_masked_convolution(device):
    shape = (128, 72, 3, 3)
    weight = torch.randn(shape, device=device) * blocks(shape, 0.4).to(device)
    x = torch.randn(2, 72, 5, 6, device=device)
    wanted = torch.nn.functional.conv2d(x, weight, padding=1, stride=2)
    out = fused_conv2d(x, weight, None, None, None, live_tiles(weight), padding=1, stride=2)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
    turned = turn_filter(weight)
    grad = fused_conv2d_bwd_input(
        wanted, turned, (5, 6), live=live_tiles(turned), padding=1, stride=2, density=0.4
    )
    wanted = torch.nn.grad.conv2d_input(x.shape, weight, wanted, 2, 1)
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (torch.ones(3, 4, 3), r"must be \(K, C, R, S\), none of them 0, got \(3, 4, 3\)"),
        (torch.ones(3, 0, 3, 3), r"none of them 0, got \(3, 0, 3, 3\)"),
        (torch.ones(3, 4, 3, 3).int(), "must be floating, or a bool mask, got torch.int32"),
        (torch.ones(1, 4097, 1, 1), "at most 4096 input channels, got 4097"),
    ],
    ids=str,
)
def test_refused(weight, words):
    with pytest.raises(RtkError, match=f"live_tiles: .*{words}"):
        live_tiles(weight)
    with FakeTensorMode() as mode, pytest.raises(RtkError, match=words):
        live_tiles(mode.from_tensor(weight))


X, W, LIVE = torch.ones(2, 4, 5, 6), torch.ones(65, 4, 3, 3), torch.ones(2, 9, dtype=torch.int64)


@pytest.mark.parametrize(
    ("live", "options", "words"),
    [
        (LIVE[:1], {}, r"live must be .* = \(2, 9\) torch.int64, got \(1, 9\) torch.int64; make"),
        (LIVE.int(), {}, r"got \(2, 9\) torch.int32; make it with live_tiles"),
        (LIVE.to("meta"), {}, "live is on meta and weight on cpu; move one"),
        (LIVE, {"density": 1.5}, "density must be 0 to 1, got 1.5"),
        (LIVE, {"density": -0.1}, "density must be 0 to 1, got -0.1"),
    ],
    ids=str,
)
def test_fused_conv2d_refuses(live, options, words):
    with pytest.raises(RtkError, match=f"fused_conv2d: .*{words}"):
        fused_conv2d(X, W, None, None, None, live, **options)


def test_densities_are_tuned_apart_if_far_apart():
    out = torch.ones(2, 65, 5, 6)
    options = {"stride": 1, "padding": 1, "upsample": 1, "residual_stride": 1}
    dense = problem_of(X, W, out, None, None, **options, density=0.1)
    assert dense.live_log2 is None
    sparse = {
        density: problem_of(X, W, out, None, None, LIVE, **options, density=density).live_log2
        for density in (1.0, 0.5, 0.25, 0.1, 0.12, 0.0)
    }
    assert sparse == {1.0: 0, 0.5: -1, 0.25: -2, 0.1: -3, 0.12: -3, 0.0: -6}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize("live_log2", [0, -1, -3, -6])
def test_a_guess_for_live_tiles_is_a_candidate(live_log2, r, stride):
    for k, size in ((64, 56), (512, 7), (2048, 1)):
        forward = Problem(128, 512, k, r, size, size, stride, r // 2, 1, 0, False, live_log2)
        backward = replace(forward, stride=1, upsample=stride, residual_stride=stride)
        for problem in (forward, backward):
            assert guess(problem) in candidates(problem)
