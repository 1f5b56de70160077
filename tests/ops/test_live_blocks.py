"""live_blocks: which blocks of a weight live, as a plain loop finds them; block_matmul by them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rtk.errors import RtkError
from rtk.ops import backend as forced
from rtk.ops import block_matmul, live_blocks
from rtk.ops._registry import ops

OP = "live_blocks"
SHAPES = [(128, 128), (128, 384), (256, 128)]
DTYPES = [torch.bool, torch.bfloat16, torch.float16, torch.float32]


def some_live(shape: tuple[int, int], block: int, density: float) -> Tensor:
    """Return a mask of blocks, of which one weight each is on."""
    live = torch.rand(shape[0] // block, shape[1] // block) < density
    mask = torch.zeros(shape, dtype=torch.bool)
    for i, j in live.nonzero().tolist():
        mask[i * block + int(torch.randint(block, ())), j * block + 3] = True
    return mask


def loop(weight: Tensor, block: int) -> list[list[bool]]:
    return [
        [bool((part != 0).any()) for part in row.split(block, 1)] for row in weight.split(block)
    ]


def assert_as_a_loop(block: int, dtype: torch.dtype, device: str, shapes=SHAPES) -> None:
    for shape in shapes:
        for mask in (some_live(shape, block, 0.4), torch.zeros(shape), torch.ones(shape)):
            weight = (mask * (torch.rand(shape) + 1)).to(device, dtype)
            spread = weight.repeat_interleave(2, 1)[:, ::2]
            for given in (weight, weight.t().contiguous().t(), spread, weight.t()):
                found = live_blocks(given, block)
                assert found.dtype == torch.bool and found.is_contiguous()
                assert found.tolist() == loop(given, block)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [32, 64, 128])
def test_blocks_are_a_plain_loops(block, dtype, backend, device):
    assert_as_a_loop(block, dtype, device)


def test_nan_lives_and_minus_zero_does_not(backend, device):
    for dtype in DTYPES[1:]:
        weight = torch.zeros(64, 96)
        weight[3, 5], weight[4, 40], weight[63, 95] = -0.0, torch.nan, 1e-7
        weight = weight.to(device, dtype)
        assert live_blocks(weight, 32).tolist() == [[False, True, False], [False, False, True]]


def test_a_mask_that_is_broadcast(backend, device):
    mask = (torch.arange(64) >= 32)[:, None].to(device).expand(64, 96)
    assert live_blocks(mask, 32).tolist() == [[False] * 3, [True] * 3]


INTERPRETED = """
from rtk.ops import backend

with backend("triton"):
    for block, dtype in ((32, torch.bool), (64, torch.float32), (128, torch.bool)):
        test.assert_as_a_loop(block, dtype, "cpu", [(block, 2 * block)])
    test.test_nan_lives_and_minus_zero_does_not.__globals__["DTYPES"][1:] = [torch.float32]
    test.test_nan_lives_and_minus_zero_does_not(None, "cpu")
    test.test_a_mask_that_is_broadcast(None, "cpu")
"""


def test_as_interpreted(interpret):
    pytest.importorskip("triton")
    interpret(INTERPRETED, __file__)


@pytest.mark.parametrize("weight", ["*i8", "*bf16", "*fp32"])
@pytest.mark.parametrize("block", [32, 128])
def test_the_kernel_compiles(block, weight, compile_for_hopper):
    from rtk.kernels import live_blocks as kernels

    types = dict.fromkeys(kernels.live_blocks.arg_names, "i32") | {"weight_NK": weight}
    constants = {"BLOCK": block, "ROWS": kernels.ROWS, "weight_k": 1}
    types |= {"out": "*i8"}
    built = compile_for_hopper(kernels.live_blocks, types, constants, ("weight_n",))
    assert built.resources["STACK"] == built.resources["LOCAL"] == 0
    assert any(access.startswith("ld.v") for access in built.accesses())


@pytest.mark.parametrize(
    ("weight", "block", "words"),
    [
        (torch.ones(4, 4, dtype=torch.int64), 2, r"must be floating, or a bool mask.*mask\.bool"),
        (torch.ones(4, 4, 1, 1), 2, r"must be \(N, K\), got \(4, 4, 1, 1\).*flatten\(1\)"),
        (torch.ones(4, 6), 4, r"blocks of 4 do not divide the weight's \(4, 6\)"),
        (torch.ones(4, 4), 0, "block_size must be at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(weight, block, words):
    with pytest.raises(RtkError, match=words):
        live_blocks(weight, block)


def test_other_sizes_and_none_at_all(device):
    assert live_blocks(torch.eye(6, device=device), 3).tolist() == [[True, False], [False, True]]
    assert live_blocks(torch.ones(0, 64, device=device), 32).shape == (0, 2)
    with forced("triton"), pytest.raises(RtkError, match="its blocks are 32, 64 or 128 wide"):
        live_blocks(torch.eye(6, device=device), 3)


def test_opcheck_no_gradient_and_one_compiled_graph(backend, device):
    weight = torch.randn(64, 96, device=device, requires_grad=True)
    torch.library.opcheck(ops[OP].overload, (weight, 32))
    assert not live_blocks(weight, 32).requires_grad
    compiled = torch.compile(live_blocks, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weight, 32), live_blocks(weight, 32))


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_a_product_by_them_is_exact_for_any_mask(density):
    weight = torch.randn(64, 96) * some_live((64, 96), 32, density)
    x = torch.randn(5, 96)
    torch.testing.assert_close(block_matmul(x, weight, live_blocks(weight, 32), 32), x @ weight.t())


@pytest.mark.gpu
def test_a_graph_follows_the_weight():
    weight = some_live((256, 384), 64, 0.5).cuda() * 1.0

    def call() -> Tensor:
        with forced("triton"):
            return live_blocks(weight, 64)

    call()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for density in (0.1, 0.0, 1.0):
        weight.copy_(some_live((256, 384), 64, density))
        graph.replay()
        assert captured.tolist() == loop(weight, 64)
