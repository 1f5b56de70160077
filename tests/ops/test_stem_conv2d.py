"""stem_conv2d and its gradient: the formula in float64, bit for bit where sums are exact."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rtk import ops
from rtk.errors import RtkError
from rtk.ops import pack_positive, stem_conv2d, stem_conv2d_bwd_input

OP = "stem_conv2d"
LAST = torch.channels_last
GEOMETRIES = {
    "7x7-pool": (7, {"stride": 2, "padding": 3, "pool": True}),
    "3x3": (3, {"stride": 1, "padding": 1, "pool": False}),
}
OTHERS = {
    "7x7": (7, {"stride": 2, "padding": 3, "pool": False}),
    "3x3-pool": (3, {"stride": 1, "padding": 1, "pool": True}),
    "5x5": (5, {"stride": 3, "padding": 0, "pool": True}),
    "1x1": (1, {"stride": 1, "padding": 0, "pool": False}),
}
SIZES = [
    (0, 31, 33),
    (1, 5, 5),
    (3, 31, 33),
    (8, 33, 63),
    (3, 63, 31),
    (1, 224, 224),
    (2, 5, 450),
    (1, 1, 1),
]
LARGE = [(8, 224, 224), (300, 31, 5), (600, 32, 32), (1, 450, 460)]  # more work than blocks


@pytest.fixture(autouse=True)
def _plain_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN may transform (Winograd, FFT), after which sums of whole numbers are not exact."""
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)


def layout(tensor: Tensor, name: str) -> Tensor:
    if name == "strided":
        return tensor.repeat_interleave(2, -1)[..., ::2]
    return tensor.contiguous(
        memory_format=LAST if name == "channels-last" else torch.contiguous_format
    )


def whole(taps: int, size: tuple[int, int, int], device: str, k: int = 64) -> list[Tensor]:
    """Arguments whose sums are exact in fp32, in any order, and full of ties."""
    x = torch.randint(0, 5, (size[0], 3, *size[1:]), device=device) / 4
    weight = torch.randint(-2, 3, (k, 3, taps, taps), device=device).float()
    bias = torch.randint(-8, 9, (k,), device=device).float()
    mean = torch.tensor([0.25, 0.5, 0.75], device=device)
    std = torch.tensor([0.25, 0.5, 0.125], device=device)
    return [x, weight, bias, mean, std]


def formula(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, std: Tensor, stride, padding, pool
) -> Tensor:
    """The unfused path in float64 on operands that were rounded to bf16; differentiable in x."""

    def rounded(value: Tensor) -> Tensor:
        return value + (value.bfloat16().double() - value).detach()

    normalised = (x.double() - mean.double().view(3, 1, 1)) / std.double().view(3, 1, 1)
    value = F.conv2d(
        rounded(normalised), weight.bfloat16().double(), bias.double(), stride, padding
    ).relu()
    return F.max_pool2d(rounded(value), 3, 2, 1) if pool else rounded(value)


def places(x: Tensor, out: Tensor, *arguments: Tensor, stride, padding, pool) -> Tensor:
    """Where the first maximum of each window lies, out of all nine places looked at in order."""
    value = formula(x, *arguments, stride, padding, False)
    padded = F.pad(value, (1, 2, 1, 2), value=-1.0)
    index = torch.full(out.shape, 9, device=x.device)
    for place in reversed(range(9)):
        row, column = divmod(place, 3)
        view = padded[:, :, row::2, column::2][:, :, : out.shape[2], : out.shape[3]]
        index[view == out.double()] = place
    return index


def check_forward(x: Tensor, *arguments: Tensor, **geometry) -> tuple[Tensor, Tensor]:
    out, index, positive = stem_conv2d(x, *arguments, save_positive=True, **geometry)
    assert torch.equal(positive, pack_positive(out.float()))
    assert torch.equal(stem_conv2d(x, *arguments, **geometry)[0], out)
    if x.shape[0] == 0:
        assert out.shape[0] == 0
        return out, index
    wanted = formula(x, *arguments, **geometry)
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous(memory_format=LAST)
    assert torch.equal(out.double(), wanted)
    assert index.dtype == torch.uint8
    if geometry["pool"]:
        assert index.is_contiguous(memory_format=LAST)
        assert torch.equal(index.long(), places(x, out, *arguments, **geometry))
    else:
        assert index.shape == (0,)
    return out, index


def check_backward(x: Tensor, arguments: list[Tensor], dtype, channels_last, **geometry) -> None:
    weight, _, _, std = arguments
    out, index = stem_conv2d(x, *arguments, **geometry)
    grad = torch.randint(-3, 4, out.shape, device=x.device)
    grad = (grad * (out > 0)).bfloat16().contiguous(memory_format=LAST)
    options = {"input_size": x.shape, "dtype": dtype, "channels_last": channels_last, **geometry}
    dx = stem_conv2d_bwd_input(grad, index, weight, std, **options)
    assert dx.dtype == dtype
    assert dx.is_contiguous(memory_format=LAST if channels_last else torch.contiguous_format)
    assert dx.shape == x.shape
    if x.shape[0] == 0:
        return
    leaf = x.double().requires_grad_()
    (wanted,) = torch.autograd.grad(formula(leaf, *arguments, **geometry), leaf, grad.double())
    assert torch.equal(dx, wanted.to(dtype))


@pytest.mark.parametrize("x_layout", ["contiguous", "channels-last", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_forward_bit_for_bit(name, size, dtype, x_layout, backend, device):
    taps, geometry = GEOMETRIES[name]
    x, *arguments = whole(taps, size, device)
    check_forward(layout(x.to(dtype), x_layout), *arguments, **geometry)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_backward_bit_for_bit(name, size, dtype, channels_last, backend, device):
    taps, geometry = GEOMETRIES[name]
    x, *arguments = whole(taps, size, device)
    check_backward(x, arguments, dtype, channels_last, **geometry)


@pytest.mark.gpu
@pytest.mark.parametrize("size", LARGE, ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_more_work_than_blocks(name, size):
    taps, geometry = GEOMETRIES[name]
    x, *arguments = whole(taps, size, "cuda")
    with ops.backend("cuda"):
        check_forward(x, *arguments, **geometry)
        check_backward(x, arguments, torch.float32, False, **geometry)


@pytest.mark.parametrize("k", [8, 24, 40, 64])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_fewer_channels(name, k, backend, device):
    taps, geometry = GEOMETRIES[name]
    x, *arguments = whole(taps, (2, 19, 22), device, k)
    check_forward(x, *arguments, **geometry)
    check_backward(x, arguments, torch.float32, True, **geometry)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_real_values(name, backend, device):
    """Random numbers: a bf16 rounding apart from float64, and the gradient of this routing."""
    taps, geometry = GEOMETRIES[name]
    x = torch.rand(3, 3, 45, 38, device=device)
    weight, bias = (
        torch.randn(64, 3, taps, taps, device=device) / taps,
        torch.randn(64, device=device),
    )
    mean = torch.tensor([0.485, 0.456, 0.406], device=device)
    std = torch.tensor([0.229, 0.224, 0.225], device=device)
    out, index = stem_conv2d(x, weight, bias, mean, std, **geometry)
    wanted = formula(x, weight, bias, mean, std, **geometry)
    torch.testing.assert_close(out.double(), wanted, rtol=2**-7, atol=1e-2)

    grad = (torch.randn(out.shape, device=device) * (out > 0)).bfloat16()
    dx = stem_conv2d_bwd_input(grad, index, weight, std, input_size=x.shape, **geometry)
    pixels = grad.double()
    if geometry["pool"]:  # scatter to the places that the forward chose
        h, w = ((n - 1) // 2 + 1 for n in x.shape[2:])
        rows = 2 * torch.arange(out.shape[2], device=device).view(-1, 1) - 1 + index.long() // 3
        flat = rows * w + 2 * torch.arange(out.shape[3], device=device) - 1 + index.long() % 3
        pixels = grad.new_zeros(3, 64, h * w, dtype=torch.float64)
        pixels = pixels.scatter_add(2, flat.flatten(2), grad.double().flatten(2))
        pixels = pixels.view(3, 64, h, w).bfloat16().double()
    exact = torch.nn.grad.conv2d_input(
        x.shape, weight.bfloat16().double(), pixels, geometry["stride"], geometry["padding"]
    ) / std.double().view(3, 1, 1)
    # Where two fp32 sums of a place differ, so may the bf16 that they are rounded to.
    torch.testing.assert_close(dx.double(), exact, rtol=1e-4, atol=5e-3 * exact.abs().max().item())
    error = (dx.double() - exact).norm() / exact.norm()
    assert error < 1e-4


@pytest.mark.parametrize("name", GEOMETRIES)
def test_twice_the_same_bits(name, backend, device):
    taps, geometry = GEOMETRIES[name]
    x = torch.rand(3, 3, 45, 38, device=device)
    weight, bias = torch.randn(64, 3, taps, taps, device=device), torch.randn(64, device=device)
    mean, std = torch.rand(3, device=device), torch.rand(3, device=device) + 0.1
    results = []
    for _ in range(2):
        out, index = stem_conv2d(x, weight, bias, mean, std, **geometry)
        dx = stem_conv2d_bwd_input(out, index, weight, std, input_size=x.shape, **geometry)
        results.append((out, index, dx))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_zeros_are_padded_after_normalising(name, backend, device):
    """An image of the mean is zero everywhere: only the bias is left, at the border too."""
    taps, geometry = GEOMETRIES[name]
    _, weight, bias, mean, std = whole(taps, (1, 9, 9), device)
    x = mean.view(1, 3, 1, 1).expand(1, 3, 9, 9)
    out, index = stem_conv2d(x, weight, bias, mean, std, **geometry)
    assert torch.equal(out, bias.relu().bfloat16().view(1, -1, 1, 1).expand_as(out))
    if geometry["pool"]:  # all is a tie: the first place that exists
        assert index[0, 0].tolist() == [[4, 3, 3], [1, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize("name", GEOMETRIES)
def test_an_upstream_gradient_in_another_layout(name, backend, device):
    taps, geometry = GEOMETRIES[name]
    x, weight, bias, mean, std = whole(taps, (2, 13, 12), device)
    out, index = stem_conv2d(x, weight, bias, mean, std, **geometry)
    options = {"input_size": x.shape, **geometry}
    wanted = stem_conv2d_bwd_input(out, index, weight, std, **options)
    given = out.contiguous(), index.contiguous(), layout(weight, "channels-last"), std
    assert torch.equal(stem_conv2d_bwd_input(*given, **options), wanted)


@pytest.mark.parametrize("name", OTHERS)
def test_other_geometries_go_to_the_reference(name, device):
    taps, geometry = OTHERS[name]
    x, *arguments = whole(taps, (2, 19, 22), device, 5)
    check_forward(x, *arguments, **geometry)
    check_backward(x, arguments, torch.float32, False, **geometry)


@pytest.mark.gpu
def test_a_forced_kernel_says_what_it_takes():
    x, *arguments = whole(3, (1, 8, 8), "cuda", 12)
    with ops.backend("cuda"):
        with pytest.raises(RtkError, match="cannot: K is 12, it takes multiples of 8 up to 64"):
            stem_conv2d(x, *arguments, stride=1, padding=1, pool=False)
        with pytest.raises(RtkError, match="cannot: it takes 7x7 filters with stride 2"):
            stem_conv2d(x, *arguments, stride=2, padding=1, pool=False)


@pytest.mark.gpu
@pytest.mark.parametrize("name", GEOMETRIES)
def test_capture_in_a_graph(name):
    taps, geometry = GEOMETRIES[name]
    x, weight, *rest = whole(taps, (4, 32, 40), "cuda")

    def both() -> list[Tensor]:
        out, index = stem_conv2d(x, weight, *rest, **geometry)
        options = {"input_size": x.shape, **geometry}
        return [out, index, stem_conv2d_bwd_input(out, index, weight, rest[2], **options)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with ops.backend("cuda"), torch.cuda.stream(side):
        both()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with ops.backend("cuda"), torch.cuda.graph(graph):
        captured = both()
    for _ in range(2):
        x.copy_(torch.rand_like(x))
        weight.copy_(torch.randn_like(weight))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, both(), strict=True))


def test_compiles_without_a_break(device):
    x, *arguments = whole(7, (2, 19, 22), device, 8)
    geometry = GEOMETRIES["7x7-pool"][1]

    def both(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, index = stem_conv2d(x * 1, *arguments, **geometry)
        options = {"input_size": x.shape, **geometry}
        dx = stem_conv2d_bwd_input(out, index, arguments[0], arguments[3], **options)
        return out, index, dx

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(x), both(x), strict=True))


def test_results_require_no_gradient(backend, device):
    x, *arguments = whole(3, (1, 6, 6), device)
    leaves = [t.requires_grad_() for t in (x, *arguments)]
    out, _ = stem_conv2d(*leaves, **GEOMETRIES["3x3"][1])
    assert not out.requires_grad


X, W, B, MEAN, STD = whole(3, (2, 6, 6), "cpu", 8)
GOOD = {"stride": 1, "padding": 1, "pool": False}


@pytest.mark.parametrize(
    ("given", "options", "words"),
    [
        ((X[0], W, B, MEAN, STD), {}, r"x must be \(N, 3, H, W\), got \(3, 6, 6\)"),
        ((X[:, :1], W, B, MEAN, STD), {}, r"x must be \(N, 3, H, W\), got \(2, 1, 6, 6\)"),
        ((X.double(), W, B, MEAN, STD), {}, "x must be float32 or bfloat16, got torch.float64"),
        ((X, W[:, :2], B, MEAN, STD), {}, r"weight must be \(K, 3, R, S\), got \(8, 2, 3, 3\)"),
        ((X, W.half(), B, MEAN, STD), {}, r"weight must be float32, got torch.float16; use .float"),
        ((X, W, B[:3], MEAN, STD), {}, r"bias must be \(8,\), got \(3,\)"),
        ((X, W, B, MEAN.view(3, 1, 1), STD), {}, r"mean must be \(3,\), got \(3, 1, 1\)"),
        ((X, W, B, MEAN, STD[:1]), {}, r"std must be \(3,\), got \(1,\)"),
        ((X, W, B.to("meta"), MEAN, STD), {}, "bias is on meta and x on cpu"),
        ((X, W, B, MEAN, STD), {"stride": 0}, "stride must be >= 1, got 0"),
        ((X, W, B, MEAN, STD), {"padding": -1}, "padding must be >= 0, got -1"),
        ((X[..., :1], W, B, MEAN, STD), {"padding": 0}, r"filter \(3, 3\) must fit into the image"),
    ],
    ids=lambda value: "" if isinstance(value, (tuple, dict)) else value[:24],
)
def test_refused(given, options, words):
    with pytest.raises(RtkError, match=f"stem_conv2d: .*{words}"):
        stem_conv2d(*given, **GOOD | options)


GRAD, NO_INDEX = torch.zeros(2, 8, 6, 6, dtype=torch.bfloat16), torch.empty(0, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("given", "options", "words"),
    [
        ((GRAD.float(), NO_INDEX), {}, "grad must be bfloat16, got torch.float32"),
        ((GRAD[:1], NO_INDEX), {}, r"grad must have the shape \(2, 8, 6, 6\) that the forward"),
        ((GRAD, NO_INDEX.long()), {}, "index must be uint8, got torch.int64"),
        ((GRAD, GRAD.to(torch.uint8)), {}, r"index must have the shape \(0,\)"),
        ((GRAD, NO_INDEX), {"pool": True}, r"grad must have the shape \(2, 8, 3, 3\)"),
        ((GRAD, NO_INDEX), {"dtype": torch.float16}, "dtype must be float32 or bfloat16"),
        ((GRAD, NO_INDEX), {"input_size": (2, 6, 6)}, r"input_size must be \(N, 3, H, W\)"),
    ],
    ids=lambda value: "" if isinstance(value, (tuple, dict)) else value[:24],
)
def test_backward_refused(given, options, words):
    with pytest.raises(RtkError, match=f"stem_conv2d_bwd_input: .*{words}"):
        stem_conv2d_bwd_input(*given, W, STD, **{"input_size": X.shape} | GOOD | options)
