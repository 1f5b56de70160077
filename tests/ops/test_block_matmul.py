"""block_matmul against x @ (w * expanded blocks)^T in float64, on every backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rtk.errors import RtkError
from rtk.ops import backend as forced
from rtk.ops import block_matmul

OP = "block_matmul"

# x; weight (N, K); block size
SHAPES = {
    "square": ((5, 12), (8, 12), 4),
    "oblong": ((7, 15), (8, 15), (2, 5)),
    "single-elements": ((3, 4), (5, 4), 1),
    "one-block": ((3, 6), (4, 6), (4, 6)),
    "vector": ((12,), (8, 12), 4),
    "batched": ((2, 3, 5, 12), (8, 12), (2, 3)),
    "no-rows": ((0, 12), (8, 12), 4),
    "one-row": ((1, 96), (64, 96), 32),
    "odd-blocks": ((33, 77), (39, 77), (13, 11)),
    "large": ((65, 256), (192, 256), 64),
    "ticket": ((33, 192), (96, 192), (32, 64)),
}
# x's and weight's dtypes; a backend not named takes all
SERVED = {
    "cpu": {torch.float32},
    "triton": {torch.float32, torch.bfloat16, torch.float16},
}


def served_shape(name: str, backend: str) -> str:
    """Return a shape in place of `name` whose blocks Triton takes, where that runs."""
    return "ticket" if backend == "triton" else name


def expand(blocks: Tensor, weight: Tensor) -> Tensor:
    """Repeat each block's factor over its block: the mask a weight element."""
    n, k = (size // count for size, count in zip(weight.shape, blocks.shape, strict=True))
    return blocks.repeat_interleave(n, 0).repeat_interleave(k, 1)


def formula(x: Tensor, weight: Tensor, blocks: Tensor) -> Tensor:
    return x @ (weight * expand(blocks, weight)).t()


def tensors(name: str, device: str, density: float = 0.4) -> tuple[dict[str, Tensor], object]:
    x, weight, size = SHAPES[name]
    bn, bk = (size, size) if isinstance(size, int) else size
    given = {
        "x": torch.randn(x, device=device),
        "weight": torch.randn(weight, device=device),
        "blocks": torch.rand(weight[0] // bn, weight[1] // bk, device=device) < density,
    }
    return given, size


@pytest.mark.parametrize("density", [0.0, 0.4, 1.0], ids=["all-off", "some", "all-on"])
@pytest.mark.parametrize("floating", [False, True], ids=["bool", "float"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape(name, floating, density, backend, device, two_threads, assert_like_formula):
    given, size = tensors(name, device, density)
    if backend == "triton" and name not in ("one-row", "large", "ticket"):
        with pytest.raises(RtkError, match="its blocks are 32, 64 or 128 wide"):
            block_matmul(*given.values(), size)
        return
    if floating:
        given["blocks"] = given["blocks"] * torch.randn(given["blocks"].shape, device=device)
    assert_like_formula(lambda x, w, b: block_matmul(x, w, b, size), formula, **given)


@pytest.mark.parametrize(
    ("x", "weight", "blocks"),
    [
        (torch.float64, torch.float64, torch.float64),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.float32, torch.float32, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bool),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float32, torch.bool),
    ],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_every_dtype(x, weight, blocks, backend, device, assert_like_formula):
    given, size = tensors(served_shape("square", backend), device)
    dtypes = (x, weight, blocks)
    given = {n: t.to(d) for (n, t), d in zip(given.items(), dtypes, strict=True)}
    if {x, weight} <= SERVED.get(backend, {x, weight}):
        assert block_matmul(*given.values(), size).dtype == x
        assert_like_formula(lambda x, w, b: block_matmul(x, w, b, size), formula, **given)
    else:
        with pytest.raises(RtkError, match=f"forced backend '{backend}' cannot"):
            block_matmul(*given.values(), size)


@pytest.mark.parametrize(
    "given",
    [lambda t: t.t().contiguous().t(), lambda t: t.repeat_interleave(2, 1)[:, ::2]],
    ids=["transposed", "every-second"],
)
def test_every_layout(given, backend, device, assert_like_formula):
    values, size = tensors(served_shape("oblong", backend), device)
    values = {name: given(tensor) for name, tensor in values.items()}
    assert_like_formula(lambda x, w, b: block_matmul(x, w, b, size), formula, **values)


@pytest.mark.parametrize("floating", [False, True], ids=["bool", "float"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_block_that_is_off_is_not_read_and_gets_no_gradient(poison, floating, backend, device):
    given, size = tensors(served_shape("square", backend), device)
    off = ~expand(given["blocks"], given["weight"])
    if floating:
        given["blocks"] = given["blocks"].float()
    clean = block_matmul(*given.values(), size)
    given["weight"] = given["weight"].masked_fill(off, poison).requires_grad_()
    given["x"].requires_grad_()
    out = block_matmul(*given.values(), size)
    assert torch.equal(out, clean)
    out.square().sum().backward()
    assert given["x"].grad.isfinite().all()
    assert (given["weight"].grad[off] == 0).all()
    assert (given["weight"].grad[~off] != 0).all()


@pytest.mark.parametrize(
    ("needed", "x_saved"), [("x", False), ("weight", True), ("blocks", True)], ids=str
)
def test_x_is_saved_only_for_the_gradients_that_need_it(needed, x_saved):
    given, size = tensors("square", "cpu")
    given["blocks"] = given["blocks"].float()
    given[needed].requires_grad_()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (saved.append(t.data_ptr()), t)[1], lambda t: t
    ):
        out = block_matmul(*given.values(), size)
    assert (given["x"].data_ptr() in saved) is x_saved
    out.sum().backward()
    assert given[needed].grad.abs().sum() > 0
    assert all(t.grad is None for name, t in given.items() if name != needed)


def test_gradcheck():
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).requires_grad_()

    given = (leaf(2, 3, 6), leaf(4, 6), leaf(2, 2))
    assert torch.autograd.gradcheck(lambda *args: block_matmul(*args, (2, 3)), given)


@pytest.mark.parametrize(
    "place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], ids=["cpu", "cuda"]
)
def test_autocast_computes_low_and_returns_fp32_gradients(place, assert_like_formula):
    given, size = tensors("large", place)

    def op(*args: Tensor) -> Tensor:
        with torch.autocast(place, torch.bfloat16):
            out = block_matmul(*args, size)
        assert out.dtype == torch.bfloat16
        return out

    assert_like_formula(op, formula, **given)


X, W, B = torch.ones(2, 6), torch.ones(4, 6), torch.ones(2, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((X, W, B, (2, 4)), r"blocks of \(2, 4\) do not divide the weight's \(4, 6\); choose"),
        ((X, W, B, (3, 3)), r"blocks of \(3, 3\) do not divide"),
        ((X, W, B, (2, 2)), r"block_mask must be .* = \(2, 3\), got \(2, 2\)"),
        ((X, W, B, (2, 3, 1)), "one or two positive ints"),
        ((X, W, B, 0), "one or two positive ints"),
        ((X[:, :5], W, B, (2, 3)), r"x must be .* with K = 6, got \(2, 5\)"),
        ((X, W[0], B, (2, 3)), r"weight must be \(N, K\), got \(6,\)"),
        ((X, W, B.int(), (2, 3)), "block_mask must be bool or floating, got torch.int32"),
        ((X, W.double(), B, (2, 3)), "x is torch.float32 and weight torch.float64"),
        ((X.int(), W.int(), B, (2, 3)), "must be equal and floating"),
        ((X, W, B.to("meta"), (2, 3)), "block_mask on meta; move them"),
    ],
    ids=[
        "divide-K",
        "divide-N",
        "blocks",
        "three-sizes",
        "zero-size",
        "K",
        "1-D",
        "int-blocks",
        "dtypes",
        "int",
        "device",
    ],
)
def test_refused(given, words):
    with pytest.raises(RtkError, match=f"block_matmul: .*{words}"):
        block_matmul(*given)


def test_density_out_of_range_is_refused():
    with pytest.raises(RtkError, match=r"density must be 0 to 1, got 1\.5"):
        block_matmul(X, W, B, (2, 3), density=1.5)


def test_no_fallback_from_a_forced_backend():
    with forced("cpu"), pytest.raises(RtkError, match="block_matmul: the forced backend 'cpu'"):
        block_matmul(X.double(), W.double(), B, (2, 3))
