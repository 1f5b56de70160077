"""fused_conv2d: the formula in float64, autograd's input gradients, and Triton as it compiles."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rtk.errors import RtkError
from rtk.ops import (
    _conv_tiles,
    fused_conv2d,
    fused_conv2d_bwd_input,
    live_tiles,
    pack_positive,
    turn_filter,
    unpack_positive,
)
from rtk.ops import backend as forced
from rtk.ops._conv_tiles import Tile, candidates
from rtk.ops._fused_conv2d_cuda import problem_of, run_cuda
from rtk.ops._registry import ops

OP = "fused_conv2d"
LAST = torch.channels_last
HALF = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """A convolution and what its epilogue does; `extra` is added to the natural output size."""

    n: int
    c: int
    size: tuple[int, int]
    k: int
    filter: tuple[int, int] = (3, 3)
    stride: int = 1
    padding: int = 0
    upsample: int = 1
    extra: tuple[int, int] | None = None
    bias: bool = False
    residual: int = 0
    gate: bool = False
    relu: bool = False

    @property
    def natural(self) -> list[int]:
        return [
            ((size - 1) * self.upsample + 1 + 2 * self.padding - taps) // self.stride + 1
            for size, taps in zip(self.size, self.filter, strict=True)
        ]

    @property
    def out_size(self) -> list[int]:
        return [size + more for size, more in zip(self.natural, self.extra or (0, 0), strict=True)]

    @property
    def options(self) -> dict[str, object]:
        return {
            "relu": self.relu,
            "stride": self.stride,
            "padding": self.padding,
            "upsample": self.upsample,
            "out_size": None if self.extra is None else self.out_size,
            "residual_stride": max(1, self.residual),
            "save_positive": False,
        }

    def tensors(self, dtype: torch.dtype, device: str) -> list[Tensor | None]:
        """Return input, weight, bias, residual and gate; half of the gate is exactly 0."""

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            tensor = (scale * torch.randn(*shape)).to(device, dtype)
            return tensor.contiguous(memory_format=LAST)

        step = max(1, self.residual)
        oh, ow = self.out_size
        reduced = self.c * self.filter[0] * self.filter[1]
        return [
            normal(self.n, self.c, *self.size),
            normal(self.k, self.c, *self.filter, scale=reduced**-0.5),
            torch.randn(self.k).to(device) if self.bias else None,
            normal(self.n, self.k, -(-oh // step), -(-ow // step)) if self.residual else None,
            normal(self.n, self.k, oh, ow).relu() if self.gate else None,
        ]


EVERYTHING = {"bias": True, "residual": 1, "gate": True, "relu": True}
CASES = {
    "1x1": Case(2, 16, (5, 7), 24, (1, 1)),
    "1x1-everything": Case(3, 40, (6, 5), 72, (1, 1), **EVERYTHING),
    "1x1-wide": Case(1, 136, (9, 8), 200, (1, 1), bias=True, relu=True),
    "1x1-stride-2": Case(2, 24, (7, 6), 40, (1, 1), stride=2, bias=True),
    "1x1-padded": Case(2, 8, (5, 4), 16, (1, 1), padding=1, **EVERYTHING),
    "3x3": Case(2, 16, (5, 7), 24),
    "3x3-everything": Case(2, 24, (9, 7), 40, padding=1, **EVERYTHING),
    "3x3-large-padding": Case(1, 8, (3, 3), 8, padding=3),
    "3x3-stride-2": Case(2, 40, (8, 9), 16, stride=2, padding=1, bias=True, relu=True),
    "3x3-stride-3": Case(1, 8, (11, 10), 8, stride=3, padding=1, gate=True),
    "3x3-wide": Case(1, 72, (5, 4), 136, padding=1, residual=1),
    "3x3-cropped": Case(2, 8, (6, 6), 8, padding=1, extra=(-2, -1), residual=1),
    "5x3": Case(2, 8, (7, 6), 16, (5, 3), padding=2, relu=True),
    "7x7-stem": Case(1, 4, (17, 14), 16, (7, 7), stride=2, padding=3, bias=True, relu=True),
    "few-channels": Case(2, 3, (6, 5), 5, padding=1, **EVERYTHING),
    "residual-stride-2": Case(2, 16, (5, 6), 24, padding=1, residual=2, gate=True),
    "1x1-residual-stride-2": Case(2, 16, (5, 6), 24, (1, 1), residual=2, gate=True),
    "one-pixel": Case(3, 16, (1, 1), 8, padding=1, **EVERYTHING),
    "upsample-1x1": Case(2, 24, (3, 4), 16, (1, 1), upsample=2, gate=True),
    "upsample-1x1-larger": Case(
        2, 24, (3, 4), 16, (1, 1), upsample=2, extra=(1, 1), residual=1, gate=True, bias=True
    ),
    "upsample-2x2": Case(2, 8, (3, 4), 8, (2, 2), padding=1, upsample=2, extra=(1, 0)),
    "upsample-3x3": Case(2, 24, (4, 3), 40, padding=1, upsample=2, gate=True),
    "upsample-3x3-larger": Case(
        2, 72, (4, 5), 24, padding=1, upsample=2, extra=(1, 1), residual=1, gate=True, relu=True
    ),
    "upsample-3x3-residual-2": Case(
        2, 8, (4, 3), 8, padding=1, upsample=2, extra=(1, 0), residual=2, gate=True
    ),
    "upsample-3x3-unpadded": Case(2, 8, (3, 3), 8, upsample=2, extra=(0, 1), bias=True),
    "upsample-3x3-cropped": Case(2, 8, (4, 4), 8, padding=2, upsample=2, extra=(-1, -2)),
    "upsample-7x7-stem": Case(1, 16, (6, 5), 4, (7, 7), padding=3, upsample=2, extra=(1, 1)),
    "upsample-one-pixel": Case(2, 8, (1, 1), 8, padding=1, upsample=2, gate=True),
    # What the CUDA kernel takes: output channels in multiples of 64.
    "64-1x1": Case(3, 40, (5, 7), 128, (1, 1), bias=True, residual=1, relu=True),
    "64-1x1-stride-2": Case(2, 24, (7, 6), 64, (1, 1), stride=2, bias=True),
    "64-3x3": Case(3, 72, (9, 7), 64, padding=1, bias=True, residual=1, relu=True),
    "64-3x3-stride-2": Case(2, 16, (8, 9), 192, stride=2, padding=1, bias=True, relu=True),
    "64-3x3-residual-2": Case(2, 16, (5, 6), 64, padding=1, residual=2),
    "64-upsample-1x1": Case(2, 24, (3, 4), 64, (1, 1), upsample=2, extra=(1, 1), residual=1),
    "64-upsample-3x3": Case(2, 72, (4, 5), 64, padding=1, upsample=2, extra=(1, 0), residual=1),
    "no-images": Case(0, 16, (5, 7), 24, padding=1, **EVERYTHING),
}


def formula(
    case: Case,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
) -> Tensor:
    """Return the result in float64: a transposed convolution where the input is upsampled."""
    input, weight = input.double(), weight.double()
    oh, ow = case.out_size
    if case.upsample == 2:
        # Padded by its whole reach, it is the full correlation; the padding then is a crop.
        z = F.conv_transpose2d(input, weight.flip(2, 3).transpose(0, 1), stride=2)
        r, s = case.filter
        top, left = r - 1 - case.padding, s - 1 - case.padding
        z = F.pad(z, (-left, ow - z.shape[3] + left, -top, oh - z.shape[2] + top))
    else:
        z = F.conv2d(input, weight, stride=case.stride, padding=case.padding)[:, :, :oh, :ow]
    v = z if bias is None else z + bias.double().view(1, -1, 1, 1)
    if residual is not None:
        spread = torch.zeros_like(v)
        spread[:, :, :: case.residual, :: case.residual] = residual.double()
        v = v + spread
    if case.relu:
        v = v.clamp_min(0)
    return v if gate is None else torch.where(gate > 0, v, 0.0)


def for_backend(case: Case, backend: str) -> Case:
    """Return the case as near to itself as the backend serves it; skip where there is none."""
    if backend != "cuda":
        return case
    if case.filter[0] != case.filter[1] or case.filter[0] > 3:
        pytest.skip("the CUDA kernel takes square filters of up to 3x3")
    return replace(
        case,
        c=-(-case.c // 8) * 8,
        k=-(-case.k // 64) * 64,
        bias=case.bias and not case.gate,
        relu=case.relu and not case.gate,
    )


def as_taken(tensors: list[Tensor | None], backend: str) -> list[Tensor | None]:
    """Return the tensors with the gate as the backend takes it: the CUDA kernel as bits."""
    *others, gate = tensors
    return [*others, pack_positive(gate) if gate is not None and backend == "cuda" else gate]


def assert_like(case: Case, dtype: torch.dtype, device: str, backend: str) -> None:
    tensors = case.tensors(dtype, device)
    given = as_taken(tensors, backend)
    before = [None if t is None else t.clone() for t in given]
    out = fused_conv2d(*given, **case.options)
    wanted = formula(case, *tensors)
    assert out.dtype == dtype and out.shape == wanted.shape
    assert out.stride() == torch.empty(out.shape).to(memory_format=LAST).stride()
    # The rounding of the result, and that of the sums (tensor cores cut off more than fp32 rounds).
    rtol, atol = {
        torch.float64: (1e-13, 1e-13),
        torch.float32: (1e-6, 1e-5),
        HALF: (2.0**-8, 1e-5 if device == "cpu" else 5e-5),
    }[dtype]
    torch.testing.assert_close(out.double(), wanted, rtol=rtol, atol=atol)
    if case.gate:
        assert torch.equal(out[~(tensors[4] > 0)], torch.zeros_like(out[~(tensors[4] > 0)]))
    for tensor, copy in zip(given, before, strict=True):
        assert tensor is None or torch.equal(tensor, copy), "an input changed"


@pytest.mark.parametrize("name", CASES)
def test_bf16_is_the_formula_rounded_once(name, backend, device):
    assert_like(for_backend(CASES[name], backend), HALF, device, backend)


@pytest.mark.parametrize("k", [64, 136, 24, 5], ids=str)
@pytest.mark.parametrize("upsample", [1, 2])
def test_positive_outputs_are_saved_as_bits_and_gate(upsample, k, backend, device):
    extra = (1, 1) if upsample == 2 else None
    case = Case(2, 16, (5, 6), k, padding=1, upsample=upsample, extra=extra, bias=True, relu=True)
    case = for_backend(case, backend)
    x, w, bias, _, _ = case.tensors(HALF, device)
    options = case.options | {"save_positive": True}
    out, bits = fused_conv2d(x, w, bias, **options)
    assert torch.equal(out, fused_conv2d(x, w, bias, **case.options))
    assert torch.equal(bits, pack_positive(out))
    assert torch.equal(unpack_positive(bits, case.k), out > 0)
    assert out[:, :, 0].count_nonzero() not in (0, out[:, :, 0].numel())

    options = case.options | {"relu": False}
    free, gated = (fused_conv2d(x, w, gate=gate, **options) for gate in (None, bits))
    assert torch.equal(gated, torch.where(out > 0, free, 0))
    if backend != "cuda":
        assert torch.equal(fused_conv2d(x, w, gate=out, **options), gated)


def test_the_order_of_the_bits():
    """Channel 64 a + 8 b + 2 q + e is bit 8 e + b of word 4 a + q."""
    for channel in range(70):
        out = torch.zeros(1, 70, 1, 2)
        out[:, channel, :, 1] = 1
        a, b, q, e = channel // 64, channel % 64 // 8, channel % 8 // 2, channel % 2
        wanted = torch.zeros(1, 1, 2, 8, dtype=torch.int32)
        wanted[..., 1, 4 * a + q] = 1 << (8 * e + b)
        assert torch.equal(pack_positive(out), wanted.to(torch.int16))
        assert torch.equal(unpack_positive(pack_positive(out), 70), out > 0)


@pytest.mark.parametrize("k", [1, 5, 63, 64, 65, 200])
def test_bits_are_packed_as_a_plain_loop_packs_them(k, device):
    out = torch.randn(2, k, 3, 2, device=device).relu()
    words = torch.zeros(2, 3, 2, 4 * -(-k // 64), dtype=torch.int32)
    for n, channel, h, w in (out > 0).nonzero().tolist():
        word = channel // 64 * 4 + channel % 8 // 2
        words[n, h, w, word] |= 1 << (8 * (channel % 2) + channel % 64 // 8)
    bits = pack_positive(out)
    assert bits.is_contiguous() and torch.equal(bits.cpu(), words.to(torch.int16))
    assert torch.equal(unpack_positive(bits, k), out > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_the_formula(name, dtype, device):
    with forced("reference"):
        assert_like(CASES[name], dtype, device, "reference")


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("filter", "padding"), [(1, 0), (3, 0), (3, 1), (3, 2), (7, 3), (4, 1)], ids=str
)
@pytest.mark.parametrize("size", [(8, 8), (9, 7), (7, 10)], ids=str)
def test_bwd_input_is_autograds(size, filter, padding, stride):
    x = torch.randn(2, 5, *size, dtype=torch.float64, requires_grad=True)
    w = torch.randn(6, 5, filter, filter, dtype=torch.float64)
    out = F.conv2d(x, w, stride=stride, padding=padding)
    grad = torch.randn_like(out)
    out.backward(grad)
    mine = fused_conv2d_bwd_input(grad, turn_filter(w), size, stride=stride, padding=padding)
    torch.testing.assert_close(mine, x.grad, rtol=1e-12, atol=1e-12)


def test_a_whole_residual_block_backwards_is_autograds():
    """Conv, ReLU, conv, plus the skip through a 1x1 with stride 2, behind a ReLU."""
    a = torch.randn(2, 4, 8, 6, dtype=torch.float64).relu().requires_grad_()
    first, second = torch.randn(6, 4, 3, 3).double(), torch.randn(6, 6, 3, 3).double()
    skip = torch.randn(6, 4, 1, 1).double()
    hidden = F.conv2d(a, first, stride=2, padding=1).relu()
    out = F.conv2d(hidden, second, padding=1) + F.conv2d(a, skip, stride=2)
    grad = torch.randn_like(out)
    out.backward(grad)
    # `a` was a ReLU's result, so its backward is one more gate.
    wanted = torch.where(a > 0, a.grad, 0.0)

    to_hidden = fused_conv2d_bwd_input(
        grad, turn_filter(second), hidden.shape[2:], gate=hidden.detach(), padding=1
    )
    along_skip = fused_conv2d(grad, turn_filter(skip))
    mine = fused_conv2d_bwd_input(
        to_hidden,
        turn_filter(first),
        a.shape[2:],
        residual=along_skip,
        gate=a.detach(),
        stride=2,
        padding=1,
        residual_stride=2,
    )
    torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "layout",
    [lambda t: t, lambda t: t.contiguous(), lambda t: t.repeat_interleave(2, -1)[..., ::2]],
    ids=["channels-last", "contiguous", "every-second"],
)
def test_every_layout(layout, backend, device):
    case = for_backend(CASES["3x3-everything"], backend)
    tensors = as_taken(case.tensors(HALF, device), backend)
    wanted = fused_conv2d(*tensors, **case.options)
    given = [t if t is None or t.dim() == 1 else layout(t) for t in tensors]
    out = fused_conv2d(*given, **case.options)
    assert torch.equal(out, wanted)
    assert out.stride() == wanted.stride()


def test_nan_goes_through_relu_and_is_stopped_by_the_gate(backend, device):
    x = torch.full((1, 8, 1, 3), 0.125, device=device, dtype=HALF)
    x[..., 1] = torch.nan
    w = torch.ones(64, 8, 1, 1, device=device, dtype=HALF)
    out, bits = fused_conv2d(x, w, relu=True, save_positive=True)
    assert out[0, 0, 0].isnan().tolist() == [False, True, False]
    assert unpack_positive(bits, 64)[0, 0, 0].tolist() == [True, False, True]
    gate = torch.tensor([1.0, 0.0, torch.nan], device=device, dtype=HALF).expand(1, 64, 1, 3)
    for taken in (pack_positive(gate), *([] if backend == "cuda" else [gate])):
        assert fused_conv2d(x, w, gate=taken)[0, 0, 0].tolist() == [1, 0, 0]
    if backend != "cuda":
        out = fused_conv2d(x, w, torch.ones(64, device=device), gate=gate)
        assert out[0, 0, 0].tolist() == [2, 0, 0]


def test_the_result_requires_no_gradient(backend, device):
    x = torch.randn(1, 8, 4, 4, device=device, dtype=HALF, requires_grad=True)
    w = torch.randn(64, 8, 1, 1, device=device, dtype=HALF, requires_grad=True)
    for out in (fused_conv2d(x, w), *fused_conv2d(x, w, relu=True, save_positive=True)):
        assert out.is_leaf and not out.requires_grad


def test_opcheck(backend, device):
    for name in ("3x3-everything", "upsample-3x3-residual-2"):
        case = for_backend(CASES[name], backend)
        tensors = as_taken(case.tensors(HALF, device), backend)
        torch.library.opcheck(ops[OP].overload, tuple(tensors), case.options)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["3x3-everything", "upsample-3x3-residual-2", "1x1-everything"])
@pytest.mark.parametrize("backend_name", ["triton", "cuda", "reference"])
def test_a_graph_follows_the_inputs(backend_name, name):
    case = for_backend(CASES[name], backend_name)

    def fresh() -> list[Tensor | None]:
        return as_taken(case.tensors(HALF, "cuda"), backend_name)

    tensors = fresh()
    with forced(backend_name):
        fused_conv2d(*tensors, **case.options)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = fused_conv2d(*tensors, **case.options)
        for _ in range(2):
            for tensor, other in zip(tensors, fresh(), strict=True):
                if tensor is not None:
                    tensor.copy_(other)
            graph.replay()
            assert torch.equal(captured, fused_conv2d(*tensors, **case.options))


X, W = torch.ones(2, 4, 5, 6), torch.ones(3, 4, 3, 3)
OUT = torch.ones(2, 3, 3, 4)


@pytest.mark.parametrize(
    ("given", "options", "words"),
    [
        ((X[0], W), {}, r"input must be \(N, C, H, W\).*got \(4, 5, 6\)"),
        ((X, W[0]), {}, r"weight must be \(K, C, R, S\).*got \(4, 3, 3\)"),
        ((X, W[:0]), {}, "weight has no output channels"),
        ((X.int(), W.int()), {}, "input must be floating, got torch.int32"),
        ((X, W[:, :2]), {}, r"input has 4 channels, weight \(3, 2, 3, 3\) takes 2"),
        ((X, W.double()), {}, "weight must be torch.float32 like the input, got torch.float64"),
        ((X, W.to("meta")), {}, "input is on cpu and weight on meta; move one"),
        ((X, W, OUT[0, 0, 0]), {}, r"bias must be \(K,\) = \(3,\), got \(4,\)"),
        ((X, W, OUT[0, :, 0, 0].double()), {}, "bias must be torch.float32 like"),
        ((X, W, None, OUT[:1]), {}, r"residual must be .* = \(2, 3, 3, 4\), got \(1, 3, 3, 4\)"),
        ((X, W, None, OUT), {"residual_stride": 2}, r"residual must be .* = \(2, 3, 2, 2\)"),
        ((X, W, None, None, OUT[..., :1]), {}, r"gate must be .* = \(2, 3, 3, 4\)"),
        ((X, W, None, None, OUT.bfloat16()), {}, "gate must be torch.float32 like the input"),
        ((X, W), {"save_positive": True}, "save_positive needs relu=True"),
        (
            (X, W, None, None, OUT.to(torch.int16)),
            {},
            r"gate must be .*4 ceil\(K / 64\)\) bits = \(2, 3, 4, 4\), got \(2, 3, 3, 4\)",
        ),
        ((X, W, None, OUT.to(torch.int16)), {}, "residual must be torch.float32 like the input"),
        ((X, W), {"stride": 0}, "stride must be at least 1, got 0"),
        ((X, W), {"padding": -1}, "padding must be at least 0, got -1"),
        ((X, W), {"upsample": 3}, "upsample must be 1 or 2, got 3"),
        ((X, W), {"upsample": 2, "stride": 2}, "upsample=2 needs stride=1, got stride=2"),
        ((X, W), {"residual_stride": 3}, "residual_stride must be 1 or 2, got 3"),
        ((X[:, :, :2], W), {}, r"at least 1 x 1, got \(0, 4\); is the filter larger"),
        ((X, W), {"out_size": (4, 4)}, r"out_size is at most \(3, 4\) here, got \(4, 4\)"),
        ((X, W), {"upsample": 2, "out_size": (8, 11)}, r"at most \(8, 10\) here, got \(8, 11\)"),
    ],
    ids=str,
)
def test_refused(given, options, words):
    with pytest.raises(RtkError, match=f"fused_conv2d: .*{words}"):
        fused_conv2d(*given, **options)


@pytest.mark.parametrize(
    ("turned", "padding", "words"),
    [
        (torch.ones(4, 3, 3, 2), 0, r"turned must be \(C, K, R, R\), got \(4, 3, 3, 2\)"),
        (torch.ones(4, 3, 3, 3), 3, "padding must be 0 to R - 1 = 2, got 3"),
    ],
    ids=["not-square", "padding"],
)
def test_bwd_input_refuses(turned, padding, words):
    with pytest.raises(RtkError, match=words):
        fused_conv2d_bwd_input(OUT, turned, (5, 6), padding=padding)


INTERPRETED = """
from rtk.kernels.fused_conv2d import Config
from rtk.ops import pack_positive
from rtk.ops.fused_conv2d import _triton

config = CONFIG
names = [*test.CASES][:: 1 if config is None else 4]  # the interpreter takes its time
for name in names:
    case = test.CASES[name]
    tensors = case.tensors(torch.float32, "cpu")
    out, _ = _triton(*tensors, config=config, **case.options)
    wanted = test.formula(case, *tensors)
    torch.testing.assert_close(
        out.double(), wanted, rtol=1e-6, atol=1e-5, msg=lambda text: f"{name}: {text}"
    )
    options = case.options | {"relu": True, "save_positive": True}
    out, positive = _triton(*tensors, config=config, **options)
    assert torch.equal(positive, pack_positive(out)), name
    if case.gate:
        tensors[4] = pack_positive(tensors[4])
        assert torch.equal(_triton(*tensors, config=config, **options)[0], out), name
    print(name)
"""


@pytest.mark.parametrize("config", ["None", "Config(16, 128, 16, warps=4, stages=2, group=2)"])
def test_triton_as_interpreted_is_the_formula(config, interpret):
    printed = interpret(INTERPRETED.replace("CONFIG", config), __file__)
    assert printed.split() == list(CASES)[:: 1 if config == "None" else 4]


# For sm_90, with the tiles that are chosen for them: ResNet-50, batch 128, forward and backward.
COMPILED = {
    "3x3-64": (Case(128, 64, (56, 56), 64, padding=1, bias=True, relu=True), 9),
    "3x3-64-gate": (Case(128, 64, (56, 56), 64, padding=1, gate=True), 9),
    "3x3-128": (Case(128, 128, (28, 28), 128, padding=1, bias=True, relu=True), 9),
    "3x3-256": (Case(128, 256, (14, 14), 256, padding=1, gate=True), 9),
    "3x3-512": (Case(128, 512, (7, 7), 512, padding=1, bias=True, relu=True), 9),
    "3x3-stride-2": (Case(128, 128, (56, 56), 128, stride=2, padding=1, bias=True, relu=True), 9),
    "3x3-upsample": (Case(128, 128, (28, 28), 128, padding=1, upsample=2, gate=True), 2.25),
    "1x1-expand": (Case(128, 64, (56, 56), 256, (1, 1), bias=True, residual=1, relu=True), 1),
    "1x1-expand-gate": (Case(128, 64, (56, 56), 256, (1, 1), residual=1, gate=True), 1),
    "1x1-reduce": (Case(128, 256, (56, 56), 64, (1, 1), bias=True, relu=True), 1),
    "1x1-reduce-gate": (Case(128, 2048, (7, 7), 512, (1, 1), gate=True), 1),
}


@pytest.mark.parametrize("name", COMPILED)
def test_triton_compiles_to_tensor_cores_without_spills(name, tmp_path):
    """Needs no GPU: what the H100's and H200's assembler makes of the chosen tile."""
    triton = pytest.importorskip("triton")
    from rtk.kernels import fused_conv2d as kernels
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    case, taps = COMPILED[name]
    reads = (case.residual > 0) + case.gate
    pixels = case.n * case.out_size[0] * case.out_size[1]
    config = kernels.choose(pixels, case.c, case.k, taps, reads, kernels.Gpu())
    constants = {
        "bias_K": None if not case.bias else "*fp32",
        "residual_NHWK": None if not case.residual else "*bf16",
        "gate_NHWK": None if not case.gate else "*i64",
        "positive_NHW": None if not case.relu else "*i64",
    }
    signature = dict.fromkeys(("x_NHWC", "w_KRSC", "out_NHWK"), "*bf16")
    signature |= {name: kind for name, kind in constants.items() if kind}
    signature |= dict.fromkeys(kernels.SIZES, "i32")
    constants = {name: None for name, kind in constants.items() if kind is None}
    constants |= kernels.constants(
        case.c, case.k, *case.filter, case.stride, case.padding, case.upsample, case.residual,
        case.relu, config,
    )  # fmt: skip
    kernel = kernels.fused_conv2d_kernel
    source = ASTSource(
        kernel,
        {name: signature.get(name, "constexpr") for name in kernel.arg_names},
        constants,
        {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(kernel.arg_names)
            if signature.get(name, "").startswith("*")
        },
    )
    compiled = triton.compile(
        source,
        GPUTarget("cuda", 90, 32),
        options={"num_warps": config.warps, "num_stages": config.stages},
    )
    ptx = compiled.asm["ptx"]
    assert f"wgmma.mma_async.sync.aligned.m64n{config.block_n}k16.f32.bf16.bf16" in ptx
    assert re.search(r"cp\.async\.cg\.shared\.global .*, 0x10", ptx)
    assert not re.search(r"cp\.async\.ca", ptx), "a copy of less than 16 bytes"
    assert "st.global.v4" in ptx or "st.global.L1" in ptx
    assert compiled.metadata.shared <= kernels.Gpu().shared
    (tmp_path / "kernel.ptx").write_text(ptx)
    ptxas = triton.knobs.nvidia.ptxas.path
    report = subprocess.run(
        [ptxas, "-v", "-arch=sm_90a", tmp_path / "kernel.ptx", "-o", tmp_path / "kernel.cubin"],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in report, report


# (batch, channels, size, output channels, filter, stride): every kind of layer of a ResNet-50 at
# 224 px and a ResNet-18 at 32 px.
LAYERS = [
    (16, 64, 56, 64, 1, 1),
    (16, 64, 56, 64, 3, 1),
    (16, 64, 56, 256, 1, 1),
    (16, 256, 56, 64, 1, 1),
    (16, 256, 56, 128, 1, 1),
    (16, 128, 56, 128, 3, 2),
    (16, 256, 56, 512, 1, 2),
    (16, 128, 28, 128, 3, 1),
    (16, 256, 28, 256, 3, 2),
    (16, 256, 14, 256, 3, 1),
    (16, 1024, 14, 256, 1, 1),
    (16, 512, 7, 512, 3, 1),
    (16, 512, 7, 2048, 1, 1),
    (128, 3, 32, 64, 3, 1),
    (128, 64, 32, 128, 1, 2),
    (128, 512, 4, 512, 3, 1),
    (100, 512, 4, 512, 3, 1),
    (7, 3, 224, 64, 7, 2),
]


@pytest.mark.gpu
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_layers_of_resnets_forward_and_backward(name, layer):
    n, c, size, k, filter, stride = layer
    if name == "cuda" and c == 3:
        pytest.skip("the CUDA kernel takes no stem")
    forward = Case(
        n, c, (size, size), k, (filter, filter), stride, filter // 2, bias=True, residual=1,
        relu=True,
    )  # fmt: skip
    backward = Case(
        n, k, tuple(forward.out_size), c, (filter, filter), 1, filter - 1 - filter // 2, stride,
        extra=(0, 0), residual=1, gate=True,
    )  # fmt: skip
    if stride == 2:
        more = [size - natural for natural in backward.natural]
        backward = replace(backward, extra=tuple(more))
    for case in (forward, backward):
        tensors = case.tensors(HALF, "cuda")
        with forced(name):
            out = fused_conv2d(*as_taken(tensors, name), **case.options)
        wanted = formula(case, *tensors)
        torch.testing.assert_close(out.double(), wanted, rtol=2.0**-8, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_every_candidate_tile(name):
    from rtk.kernels.fused_conv2d import candidates

    from rtk.ops.fused_conv2d import _triton

    case = CASES[name]
    tensors = case.tensors(HALF, "cuda")
    wanted = formula(case, *tensors)
    for config in candidates(case.c, case.k):
        out, _ = _triton(*tensors, config=config, **case.options)
        torch.testing.assert_close(out.double(), wanted, rtol=2.0**-8, atol=5e-5)


# Every kind of tile, strides and classes, channels that are no multiple of a tile's.
SPARSE = {
    "3x3": Case(5, 192, (9, 7), 192, padding=1, bias=True, residual=1, relu=True),
    "3x3-one-pixel-tiles": Case(130, 128, (3, 4), 256, padding=1, bias=True, relu=True),
    "3x3-512": Case(16, 512, (7, 7), 512, padding=1, residual=1, gate=True),
    "3x3-64": Case(9, 136, (16, 15), 64, padding=1, gate=True),
    "3x3-unpadded": Case(4, 64, (10, 10), 128, bias=True),
    "3x3-stride-2": Case(6, 128, (9, 8), 320, stride=2, padding=1, bias=True, relu=True),
    "3x3-residual-2": Case(3, 64, (9, 7), 128, padding=1, residual=2),
    "upsample": Case(
        5, 192, (5, 4), 256, padding=1, upsample=2, extra=(1, 1), residual=2, gate=True
    ),
    "upsample-1x1": Case(3, 128, (4, 4), 128, (1, 1), upsample=2, extra=(1, 0), residual=1),
    "1x1": Case(5, 200, (9, 7), 448, (1, 1), bias=True, residual=1, relu=True),
    "1x1-stride-2": Case(5, 256, (9, 7), 128, (1, 1), stride=2, bias=True),
}


@pytest.mark.gpu
@pytest.mark.parametrize("density", [0, "one block", 0.1, 0.5, 1], ids=str)
@pytest.mark.parametrize("name", SPARSE)
def test_live_blocks_and_no_others_are_multiplied(name, density, monkeypatch):
    """Dead blocks hold NaN where a tile promises to skip them, so one product would show."""
    monkeypatch.setattr(_conv_tiles, "_WASTE", 8)  # tiles that no one would take are to be right
    case = SPARSE[name]
    x, weight, bias, residual, gate = case.tensors(HALF, "cuda")
    blocks = torch.rand(-(-case.k // 64), -(-case.c // 64), *case.filter, device="cuda")
    blocks = blocks == blocks.min() if density == "one block" else blocks < density
    mask = blocks.repeat_interleave(64, 0).repeat_interleave(64, 1)[:, : case.c]
    live = live_tiles(mask)
    masked, poisoned = (
        weight.masked_fill(~mask, value).contiguous(memory_format=LAST) for value in (0, torch.nan)
    )
    given = [x, masked, bias, residual, None if gate is None else pack_positive(gate), live]
    wanted = formula(case, x, masked, bias, residual, gate)
    options = case.options | {"save_positive": case.relu}
    out, _ = run_cuda(*given, **options)  # the guess
    problem = problem_of(x, masked, out, residual, gate, live, **options, density=0.25)

    def fits(tile: Tile) -> bool:
        try:
            run_cuda(*given, tile=tile, **options)
        except ValueError:
            return False
        return True

    tiles = candidates(problem, fits)
    skipping = {(tile.channels, tile.blocks) for tile in tiles if not tile.resident}
    assert len(skipping) == (5 if case.k >= 256 else 4 if case.k >= 128 else 2)
    for tile in tiles:
        taken = masked if tile.resident else poisoned
        out, positive = run_cuda(x, taken, *given[2:], tile=tile, **options)
        torch.testing.assert_close(
            out.double(), wanted, rtol=2.0**-8, atol=1e-4, msg=partial("{}: {}".format, tile)
        )
        if case.relu:
            assert torch.equal(positive, pack_positive(out)), tile
