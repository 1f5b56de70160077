"""block_matmul's Triton kernels: as interpreted, as compiled for Hopper, and on a GPU."""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rtk.ops import backend as forced
from rtk.ops import block_matmul

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BLOCKS = [(128, 128), (64, 64), (32, 32), (128, 32), (32, 128), (64, 32)]


def expand(blocks: Tensor, bn: int, bk: int) -> Tensor:
    return blocks.repeat_interleave(bn, 0).repeat_interleave(bk, 1)


def draw(
    m: int, n: int, k: int, bn: int, bk: int, density: float, floating: bool, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x, weight, block mask and upstream gradient."""
    x, weight = torch.randn(m, k, device=device), torch.randn(n, k, device=device)
    blocks = torch.rand(n // bn, k // bk, device=device) < density
    if floating:
        blocks = blocks * torch.randn(blocks.shape, device=device)
    return x, weight, blocks, torch.randn(m, n, device=device)


def gradients(x: Tensor, weight: Tensor, blocks: Tensor, grad: Tensor, run) -> dict[str, Tensor]:
    """Return the value of run(x, weight, blocks) and all its gradients."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in (x, weight, blocks)]
    out = run(*leaves)
    out.backward(grad.to(out.dtype))
    named = dict(zip(("x", "weight", "blocks"), leaves, strict=True))
    return {"value": out.detach()} | {n: t.grad for n, t in named.items() if t.requires_grad}


def assert_as_in_float64(
    given: tuple[Tensor, ...], bn: int, bk: int, tolerance: float, density: float = 0.25
) -> None:
    """Compare the forced Triton backend, relative to the largest number of each result."""
    with forced("triton"):
        mine = gradients(*given, lambda *t: block_matmul(*t, (bn, bk), density=density))
    exact = [t.double() if t.is_floating_point() else t for t in given]
    wanted = gradients(*exact, lambda x, w, b: x @ (w * expand(b, bn, bk)).t())
    for name, value in wanted.items():
        scale = max(1.0, value.abs().max().item())
        torch.testing.assert_close(
            mine[name].double(),
            value,
            rtol=tolerance,
            atol=tolerance * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    assert not mine["weight"][~expand(given[2] != 0, bn, bk)].any()


INTERPRETED = """
import itertools
from rtk.ops import _block_matmul_triton as triton

SIZES = [
    (33, 128, 192, 64, 64), (65, 96, 64, 32, 32), (5, 256, 128, 128, 128), (70, 128, 96, 64, 32),
]
CUTS = [
    (triton.Product(32, 1, 1, 32, 4, 2), triton.Sum(2, 32, 4, 2, True)),
    (triton.Product(64, 2, 2, 32, 4, 2), triton.Sum(2, 16, 4, 2, False)),
    (triton.Product(32, 2, 1, 16, 4, 2), triton.Sum(1, 32, 4, 2, False)),
]
DENSITIES = [(0, False), (0.4, False), (0.4, True), (1, True)]
for i, ((product, total), size) in enumerate(itertools.product(CUTS, SIZES)):
    density, floating = DENSITIES[(i + i // 4) % 4]
    triton.choose_product, triton.choose_sum = lambda *_: product, lambda *_: total
    test.assert_as_in_float64(test.draw(*size, density, floating), *size[3:], 2e-5)

# Many rows and few blocks: parts along M.
triton._multiprocessors = lambda device: 64
for total, floating in itertools.product([cut[1] for cut in CUTS], (False, True)):
    triton.choose_sum = lambda *_: total
    test.assert_as_in_float64(test.draw(700, 64, 64, 32, 32, 0.6, floating), 32, 32, 2e-5)
"""


def test_as_interpreted(interpret):
    pytest.importorskip("triton")
    interpret(INTERPRETED, __file__)


def products(dtype: str, tf32: bool) -> list[tuple[int, int, object]]:
    from rtk.ops._block_matmul_triton import choose_product

    return [
        (outputs, inputs, choose_product(outputs, inputs, DTYPES[dtype], density, tf32))
        for (outputs, inputs), density in itertools.product(BLOCKS, (0.1, 1.0))
    ]


PRECISIONS = [("bf16", False), ("fp16", False), ("fp32", True), ("fp32", False)]
PRECISION_IDS = ["bf16", "fp16", "tf32", "fp32"]


def assert_tensor_cores(ptx: str, dtype: str, folder: Path) -> None:
    triton = pytest.importorskip("triton")
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", str(source)]
    done = subprocess.run(
        [*command, "-o", str(folder / "again.cubin")], capture_output=True, text=True, check=True
    )
    assert "serialized" not in done.stdout + done.stderr, "a product waits for the one before"
    wanted = {"bf16": "bf16.bf16", "fp16": "f16.f16", "fp32": "tf32.tf32"}[dtype]
    found = re.findall(r"wgmma\.mma_async[^;]*;", ptx)
    assert found, "no wgmma"
    for product in found:
        assert f".f32.{wanted}" in product
        # Both operands by descriptor: neither goes through registers.
        assert re.search(r"}, %rd\d+, %rd\d+, ", product)
    assert "wgmma.wait_group.sync.aligned 0" in ptx
    assert re.search(r"wgmma\.wait_group\.sync\.aligned [12];", ptx), "it waits for every product"


@pytest.mark.parametrize(("dtype", "tf32"), PRECISIONS, ids=PRECISION_IDS)
def test_products_compile_to_tensor_cores_and_tma_without_spills(
    dtype, tf32, compile_for_hopper, tmp_path
):
    from rtk.kernels import block_matmul as kernels

    from rtk.ops._block_matmul_triton import product_constants

    precision = "tf32" if tf32 else "ieee"
    for (outputs, inputs, config), transposed in itertools.product(
        products(dtype, tf32), (True, False) if dtype != "fp32" else (True,)
    ):
        constants = product_constants(config, outputs, inputs, 32, transposed, precision)
        constants["EARLY"] = True
        block_m, block_n, step = (constants[n] for n in ("BLOCK_M", "BLOCK_N", "STEP"))
        w = (block_n, step) if transposed else (step, block_n)
        types = dict.fromkeys(("entries", "counts", "order"), "*i32")
        types |= dict.fromkeys(("tiles_m", "tiles_n", "together"), "i32")
        types |= {
            "x_desc": f"tensordesc<{dtype}[{block_m},{step}]>",
            "w_desc": f"tensordesc<{dtype}[{w[0]},{w[1]}]>",
            "out_desc": f"tensordesc<{dtype}[{block_m},{block_n}]>",
        }
        built = compile_for_hopper(
            kernels.multiply, types, constants, num_warps=config.warps, num_stages=config.stages
        )
        assert built.resources["LOCAL"] == built.resources["STACK"] == 0, config
        assert built.resources["REG"] * 32 * config.warps <= 65536
        # Two fetches a stage of the prologue, two in the loop, and the result.
        assert built.ptx.count("cp.async.bulk.tensor") == 2 * config.stages + 1
        assert "cp.async.ca" not in built.ptx, "the list is pipelined and takes stages"
        if dtype != "fp32" or tf32:
            assert_tensor_cores(built.ptx, dtype, tmp_path)


@pytest.mark.parametrize(("dtype", "tf32"), PRECISIONS, ids=PRECISION_IDS)
@pytest.mark.parametrize(
    "needs", [(True, False), (False, True), (True, True)], ids=["weight", "scores", "both"]
)
def test_sums_compile_to_tensor_cores_without_spills(
    needs, dtype, tf32, compile_for_hopper, tmp_path
):
    from rtk.kernels import block_matmul as kernels

    from rtk.ops._block_matmul_triton import choose_sum, sum_constants

    precision = "tf32" if tf32 else "ieee"
    for (bn, bk), density in itertools.product(BLOCKS, (1.0,) if needs[1] else (0.1, 1.0)):
        config = choose_sum(bn, bk, DTYPES[dtype], needs, density, tf32)
        constants = sum_constants(config, bn, bk, DTYPES[dtype], needs, True, False, precision)
        constants |= {"column_stride": 1, "weight_k": 1, "EARLY": True}
        along_m = ("grad_m", "x_m") if tf32 else ("grad_n", "x_k")
        constants |= dict.fromkeys(along_m, 1)
        types = dict.fromkeys(kernels.multiply_weight.arg_names, "i32")
        types |= {"grad_MN": f"*{dtype}", "x_MK": f"*{dtype}", "mask": "*i8", "scores": "*fp32"}
        types |= dict.fromkeys(("weight", "out"), "*fp32") | {"out_part": "i64"}
        types |= dict.fromkeys(("block_at", "group_counts"), "*i32")
        if not config.gather:
            types["grad_MN"] = f"tensordesc<{dtype}[{config.step},{bn}]>"
            types["x_MK"] = f"tensordesc<{dtype}[{config.step},{bk}]>"
        rows = ("grad_m", "grad_n", "x_m", "x_k", "k_size", "weight_n")
        divisible = tuple(name for name in rows if name not in along_m)
        built = compile_for_hopper(
            kernels.multiply_weight,
            types,
            constants,
            divisible,
            num_warps=config.warps,
            num_stages=config.stages,
        )
        assert built.resources["LOCAL"] == built.resources["STACK"] == 0, (bn, bk, config)
        assert built.resources["REG"] * 32 * config.warps <= 65536
        copies = "cp.async.cg.shared.global" if config.gather else "cp.async.bulk.tensor"
        assert copies in built.ptx
        if dtype != "fp32" or tf32:
            assert "cp.async.ca" not in built.ptx, "a copy of less than 16 bytes"
            assert_tensor_cores(built.ptx, dtype, tmp_path)


@pytest.mark.parametrize("mask", ["*i8", "*fp32", "*bf16"])
def test_the_small_kernels_compile(mask, compile_for_hopper):
    from rtk.kernels import block_matmul as kernels

    def build(kernel, types: dict[str, str], constants: dict[str, int], warps: int = 4) -> None:
        types = dict.fromkeys(kernel.arg_names, "i32") | {"mask": mask} | types
        built = compile_for_hopper(kernel, types, constants, num_warps=warps)
        assert built.resources["STACK"] == 0

    lists = dict.fromkeys(("entries", "counts", "order", "block_at", "group_counts"), "*i32")
    shared = {"CAPACITY": 128, "CHUNK": 32, "column_stride": 1, "EARLY": True}
    build(kernels.plan, lists, shared | {"R": 4, "C": 2, "PIECES": 2}, warps=8)
    build(kernels.plan_weight, lists, shared | {"ALL": False, "SLOTS": 4}, warps=8)
    tensors = {"weight": "*fp32", "out": "*bf16", "parts": "*fp32"}
    block = {"BN": 128, "BK": 128, "column_stride": 1}
    rows, columns = kernels.PREPARED
    pieces = {"ROWS": rows, "COLUMNS": columns, "EARLY": True}
    fill = pieces | {"FILL": True, "weight_k": 1, "out_k": 1}
    build(kernels.prepare, tensors, block | fill)
    build(kernels.combine, tensors, block | {"PIECE": kernels.PIECE})


SIZES = {"odd": (333, 256, 384), "one-row": (1, 128, 256), "tall": (5001, 128, 256)}


@pytest.fixture
def tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)


@pytest.mark.gpu
@pytest.mark.parametrize("hint", [0.1, 1.0], ids=["narrow", "full"])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(dtype, name, block, hint):
    low = DTYPES[dtype]
    tolerance = {"bf16": 2e-2, "fp16": 3e-3, "fp32": 3e-5}[dtype]
    for density, floating in [(0, False), (0.3, False), (0.3, True), (1, True)]:
        x, weight, blocks, grad = draw(*SIZES[name], *block, density, floating, "cuda")
        weight = weight if floating else weight.to(low)  # a master beside floats
        assert_as_in_float64((x.to(low), weight, blocks, grad.to(low)), *block, tolerance, hint)


@pytest.mark.gpu
@pytest.mark.parametrize("hint", [0.1, 1.0], ids=["narrow", "full"])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_tf32_on_a_gpu(name, block, hint, tf32):
    given = draw(*SIZES[name], *block, 0.4, True, "cuda")
    assert_as_in_float64(given, *block, 5e-3, hint)


@pytest.mark.gpu
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("floating", [False, True], ids=["bool", "float"])
def test_a_graph_follows_the_mask(floating, block):
    given = [t.bfloat16() for t in draw(300, 256, 384, block, block, 0.4, True, "cuda")]
    if not floating:
        given[2] = given[2] != 0

    def run() -> dict[str, Tensor]:
        with forced("triton"):
            return gradients(*given, lambda *t: block_matmul(*t, block))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for density in (0.0, 0.6, 1.0):
        fresh = draw(300, 256, 384, block, block, density, True, "cuda")
        for tensor, other in zip(given, fresh, strict=True):
            tensor.copy_(other if tensor.dtype != torch.bool else other != 0)
        graph.replay()
        for name, value in run().items():
            assert torch.equal(captured[name], value), name


@pytest.mark.gpu
def test_under_compile():
    given = [t.bfloat16() for t in draw(256, 128, 192, 64, 64, 0.4, True, "cuda")]

    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return block_matmul(x, w, b, 64).relu()

    eager = gradients(*given, run)
    compiled = gradients(*given, torch.compile(run, fullgraph=True))
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, msg=name)
