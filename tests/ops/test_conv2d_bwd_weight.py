"""conv2d_bwd_weight_live: autograd's gradient in float64, masked, and Triton as it compiles."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rtk.errors import RtkError
from rtk.ops import backend as forced
from rtk.ops import conv2d_bwd_weight_live, live_tiles

OP = "conv2d_bwd_weight_live"
LAST = torch.channels_last
HALF = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """A convolution, the share of its blocks that live, and the mask over its elements."""

    n: int
    c: int
    size: tuple[int, int]
    k: int
    filter: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    density: float = 0.5
    mask: str | None = None

    @property
    def weight_size(self) -> tuple[int, int, int, int]:
        return self.k, self.c, *self.filter

    @property
    def conv(self) -> tuple[tuple[int, int], ...]:
        return self.stride, self.padding, self.dilation

    def tensors(
        self, dtype: torch.dtype, device: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return grad, input, the elements in live blocks (bool), and the mask or None."""
        x = torch.randn(self.n, self.c, *self.size).to(device, dtype).contiguous(memory_format=LAST)
        weight = torch.empty(self.weight_size, device="meta")
        out = F.conv2d(torch.empty(x.shape, device="meta"), weight, None, *self.conv)
        grad = torch.randn(out.shape).to(device, dtype)
        blocks = torch.rand(-(-self.k // 64), -(-self.c // 64), *self.filter)
        live = torch.zeros(blocks.shape, dtype=torch.bool).flatten()
        live[blocks.flatten().argsort()[: round(self.density * blocks.numel())]] = True
        live = live.view_as(blocks).repeat_interleave(64, 0).repeat_interleave(64, 1)
        k, c, r, s = self.weight_size
        mask = {
            None: None,
            "bool": torch.rand(k, c, r, s) < 0.5,
            "channel": torch.rand(k, 1, 1, 1) < 0.5,
            "row": torch.randn(k, c, r, 1),
            "float": torch.randn(k, c, r, s).contiguous(memory_format=LAST),
        }[self.mask]
        return (
            grad.contiguous(memory_format=LAST),
            x,
            live[:k, :c].to(device),
            None if mask is None else mask.to(device),
        )


CASES = {
    "3x3": Case(2, 128, (5, 7), 128),
    "3x3-odd": Case(3, 72, (9, 6), 136, mask="bool"),
    "3x3-stride-2": Case(3, 64, (9, 8), 192, stride=(2, 2), mask="float"),
    "3x3-uneven": Case(
        3, 136, (9, 6), 72, stride=(2, 1), padding=(1, 2), dilation=(1, 2), density=1, mask="row"
    ),
    "1x1": Case(3, 320, (5, 4), 64, (1, 1), padding=(0, 0), mask="channel"),
    "1x1-stride-2": Case(2, 192, (6, 5), 128, (1, 1), (2, 2), (0, 0)),
    "5x2": Case(2, 64, (8, 6), 64, (5, 2), padding=(3, 0), density=0.3),
    "dead": Case(2, 128, (4, 4), 128, density=0, mask="bool"),
    "one-block": Case(9, 128, (7, 7), 128, density=1 / 36),
    "one-pixel": Case(5, 64, (1, 1), 64, density=1),
    "many-pixels": Case(12, 64, (7, 7), 128, density=0.3, mask="bool"),
}


PLACES = [
    ("reference", "cpu"),
    pytest.param("reference", "cuda", marks=pytest.mark.gpu),
    pytest.param("triton", "cuda", marks=pytest.mark.gpu),
]


def formula(case: Case, grad: Tensor, x: Tensor, live: Tensor, mask: Tensor | None) -> Tensor:
    weight = torch.zeros(case.weight_size, dtype=torch.float64, device=x.device).requires_grad_()
    F.conv2d(x.double(), weight, None, *case.conv).backward(grad.double())
    masked = weight.grad * live
    return masked if mask is None else masked * mask.double()


def run(
    case: Case,
    grad: Tensor,
    x: Tensor,
    live: Tensor,
    mask: Tensor | None,
    backend: str = "reference",
    **options: object,
) -> Tensor:
    words = live_tiles(live)  # which has other backends
    with forced(backend):
        return conv2d_bwd_weight_live(
            grad, x, words, case.weight_size, *case.conv, mask=mask, density=case.density, **options
        )


def assert_like_formula(case: Case, dtype: torch.dtype, device: str, backend: str) -> None:
    tensors = case.tensors(dtype, device)
    wanted = formula(case, *tensors)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for channels_last in (True, False):
        out = run(case, *tensors, backend, channels_last=channels_last)
        assert out.dtype == torch.promote_types(dtype, torch.float32)
        assert out.is_contiguous(memory_format=LAST if channels_last else torch.contiguous_format)
        torch.testing.assert_close(
            out.double(), wanted, rtol=tolerance, atol=tolerance * max(1, wanted.abs().max().item())
        )
        assert not out[wanted == 0].any()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("backend_name", "device_name"), PLACES)
def test_autograds_gradient_where_it_lives_and_exactly_0_elsewhere(name, backend_name, device_name):
    assert_like_formula(CASES[name], HALF, device_name, backend_name)


@pytest.mark.parametrize("name", ["3x3-odd", "3x3-uneven"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_other_types(name, dtype, device):
    assert_like_formula(CASES[name], dtype, device, "reference")
    if device == "cuda" and dtype == torch.float16:
        assert_like_formula(CASES[name], dtype, device, "triton")


@pytest.mark.parametrize(("backend_name", "device_name"), PLACES)
def test_what_is_dead_or_pruned_is_0_beside_infinities(backend_name, device_name):
    grad, x, live, _ = CASES["3x3"].tensors(HALF, device_name)
    grad[0, 1, 2, 3] = torch.inf
    x[1, 2, 3, 4] = torch.nan
    mask = torch.rand(CASES["3x3"].weight_size, device=device_name) < 0.5
    out = run(CASES["3x3"], grad, x, live, mask, backend_name)
    assert not out.isfinite().all()
    assert not out[~(mask & live)].any()


@pytest.mark.parametrize(("backend_name", "device_name"), PLACES)
def test_no_images_and_bits_past_the_channels(backend_name, device_name):
    case = Case(0, 64, (4, 4), 64)
    grad, x = (torch.randn(0, 64, 4, 4, device=device_name, dtype=HALF) for _ in range(2))
    words = torch.full((1, 9), -1, device=device_name)
    with forced(backend_name):
        assert not conv2d_bwd_weight_live(grad, x, words, case.weight_size, padding=1).any()
        grad, x = (torch.randn(3, 64, 4, 4, device=device_name, dtype=HALF) for _ in range(2))
        out = conv2d_bwd_weight_live(grad, x, words, case.weight_size, padding=1)
        same = conv2d_bwd_weight_live(grad, x, words & 1, case.weight_size, padding=1)
    assert torch.equal(out, same) and out.any()


def test_the_result_requires_no_gradient():
    grad, x, live, _ = CASES["1x1"].tensors(torch.float32, "cpu")
    assert not run(
        CASES["1x1"], grad.requires_grad_(), x.requires_grad_(), live, None
    ).requires_grad


# ResNet-50's 3x3 convolutions, batch 128, and what divides badly.
LARGE = [
    Case(128, c, (size, size), k, stride=(stride, stride), density=density, mask=mask)
    for c, k, size, stride in [
        (64, 64, 56, 1), (128, 128, 28, 1), (256, 256, 14, 1), (512, 512, 7, 1), (256, 256, 28, 2),
    ]
    for density, mask in [(1, None), (0.5, "bool"), (0.1, "bool"), (0.02, None)]
]  # fmt: skip
LARGE += [
    Case(128, 1024, (14, 14), 256, (1, 1), padding=(0, 0), density=density) for density in (1, 0.1)
]
LARGE += [Case(33, 200, (13, 15), 328, density=0.3, mask="float")]


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_under_every_config(case):
    from rtk.kernels import conv2d_bwd_weight as kernels

    from rtk.ops.conv2d_bwd_weight import _triton

    grad, x, live, mask = case.tensors(HALF, "cuda")
    wanted = run(case, grad, x, live, mask)  # in fp32, without TF32
    words = live_tiles(live)
    arguments = (grad, x, words, case.weight_size, *case.conv, mask, True, case.density)
    for config in kernels.CONFIGS:
        out = _triton(*arguments, config)
        torch.testing.assert_close(out, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())
        assert not out[~live].any() and (mask is None or not out[(mask == 0).expand_as(out)].any())
        assert torch.equal(out, _triton(*arguments, config)), "it must not depend on the order"


@pytest.mark.gpu
def test_a_graph_follows_the_live_blocks():
    case = Case(8, 128, (9, 9), 192, mask="bool")
    given = list(case.tensors(HALF, "cuda"))
    given[2] = live_tiles(given[2])

    def run_now() -> Tensor:
        grad, x, words, mask = given
        with forced("triton"):
            return conv2d_bwd_weight_live(
                grad, x, words, case.weight_size, *case.conv, mask=mask, density=case.density
            )

    run_now()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_now()
    for _ in range(3):
        fresh = list(case.tensors(HALF, "cuda"))
        fresh[2] = live_tiles(fresh[2])
        for tensor, other in zip(given, fresh, strict=True):
            tensor.copy_(other)
        graph.replay()
        assert torch.equal(captured, run_now())


INTERPRETED = """
from rtk.kernels import conv2d_bwd_weight as kernels

few = ["one-pixel", "5x2"]  # the interpreter takes its time
most = [*few, "1x1-stride-2", "3x3-uneven", "3x3-stride-2", "1x1", "dead"]
for slots, step, programs, names in [(2, 32, 4, most), (1, 32, 1, few), (4, 16, 2, few)]:
    kernels.choose = lambda *_: kernels.Config(slots, step, 4, 2, programs)
    for name in names:
        test.assert_like_formula(test.CASES[name], torch.float32, "cpu", "triton")
"""


def test_triton_as_interpreted_is_the_formula(interpret):
    pytest.importorskip("triton")
    interpret(INTERPRETED, __file__)


COMPILED = {
    "256": (256, 256, (3, 3), 1),
    "512-stride-2": (512, 512, (3, 3), 2),
    "ragged": (200, 328, (3, 3), 1),
    "1x1": (1024, 256, (1, 1), 1),
}


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("name", COMPILED)
def test_triton_compiles_to_tensor_cores_without_spills(name, index, compile_for_hopper):
    from rtk.kernels import conv2d_bwd_weight as kernels

    channels, k, filter, stride = COMPILED[name]
    config = kernels.CONFIGS[index]
    constants = kernels.constants(
        channels, k, *filter, [stride] * 2, [filter[0] // 2] * 2, [1, 1], config
    )
    types = {"grad_NHWK": "*bf16", "x_NHWC": "*bf16", "parts": "*fp32"}
    types |= {"block_at": "*i32", "group_count": "*i32"} | dict.fromkeys(kernels.SIZES, "i32")
    built = compile_for_hopper(
        kernels.multiply, types, constants, num_warps=config.warps, num_stages=config.stages
    )
    products = re.findall(r"wgmma\.mma_async[^;]*;", built.ptx)
    wide = min(64 * config.slots, 128)  # a warpgroup's
    assert len(products) == config.step // 16  # one loop, and it is not unrolled
    for product in products:
        assert product.startswith(f"wgmma.mma_async.sync.aligned.m64n{wide}k16.f32.bf16.bf16")
        # Both operands by descriptor, both with the channels along their rows: transposed.
        assert re.search(r"}, %rd\d+, %rd\d+, %p\d+, 1, 1, 1, 1;$", product)
    assert re.search(r"cp\.async\.cg\.shared\.global .*, 0x10", built.ptx)
    assert "cp.async.ca" not in built.ptx, "a copy of less than 16 bytes"
    assert built.resources["LOCAL"] == built.resources["STACK"] == 0
    assert built.resources["REG"] * 32 * config.warps * config.programs <= 65536


@pytest.mark.parametrize("kind", [None, "*i8", "*fp32"])
def test_the_small_kernels_compile(kind, compile_for_hopper):
    from rtk.kernels import conv2d_bwd_weight as kernels

    types = {"live": "*i64"} | dict.fromkeys(("block_at", "place_of", "group_count"), "*i32")
    built = compile_for_hopper(kernels.plan, types, kernels.plan_constants(512, 512, 9, 4))
    assert built.resources["LOCAL"] == 0
    compiled_for = kernels.constants(512, 512, 3, 3, [1, 1], [1, 1], [1, 1], kernels.CONFIGS[2])
    constants = {name: compiled_for[name] for name in ("CHUNKS", "TAPS", "S", "SLOTS", "FEWEST")}
    constants |= {"PIECE": kernels.PIECE, "TOGETHER": kernels.TOGETHER, "mask_c": 1, "out_c": 1}
    names = kernels.combine.arg_names
    types = dict.fromkeys(names, "i32") | {"parts": "*fp32", "out_KCRS": "*fp32"}
    types |= {"place_of": "*i32", "group_count": "*i32"}
    if kind is None:
        constants["mask_KCRS"] = None
    else:
        types["mask_KCRS"] = kind
    built = compile_for_hopper(kernels.combine, types, constants, ("out_k", "out_r", "out_s"))
    assert "ld.global.v4.b32" in built.ptx
    assert built.resources["LOCAL"] == built.resources["STACK"] == 0


X, GRAD, LIVE = torch.ones(2, 4, 5, 6), torch.ones(2, 3, 3, 4), torch.ones(1, 9).long()
SIZE = (3, 4, 3, 3)


@pytest.mark.parametrize(
    ("given", "options", "words"),
    [
        ((GRAD, X[0], LIVE, SIZE), {}, r"input must be \(N, C, H, W\).*got \(4, 5, 6\)"),
        ((GRAD, X.int(), LIVE, SIZE), {}, "input must be floating, got torch.int32"),
        ((GRAD, X, LIVE, (3, 5, 3, 3)), {}, r"with the input's C = 4, got \(3, 5, 3, 3\)"),
        ((GRAD, X, LIVE, (3, 4, 9, 9)), {}, "is the filter larger than the padded input"),
        ((GRAD, X, LIVE, SIZE), {"padding": 1}, r"= \(2, 3, 5, 6\) .*got \(2, 3, 3, 4\)"),
        ((GRAD.half(), X, LIVE, SIZE), {}, "in the input's torch.float32, got .* torch.float16"),
        ((GRAD, X, LIVE[:, :8], SIZE), {}, r"live must be .* = \(1, 9\) .*got \(1, 8\)"),
        ((GRAD, X, LIVE.int(), SIZE), {}, r"got \(1, 9\) torch.int32; make it with live_tiles"),
        ((GRAD, X, LIVE.to("meta"), SIZE), {}, "input is on cpu and live on meta; move one"),
        ((GRAD, X, LIVE, SIZE), {"mask": torch.ones(4, 1, 1).int()}, "use mask.bool"),
        ((GRAD, X, LIVE, SIZE), {"mask": torch.ones(2)}, r"\(3, 4, 3, 3\), got \(2,\)"),
        ((GRAD, X, LIVE, SIZE), {"stride": 0}, r"stride must be at least 1, got \[0, 0\]"),
        ((GRAD, X, LIVE, SIZE), {"padding": -1}, "padding must be at least 0"),
        ((GRAD, X, LIVE, SIZE), {"dilation": (1, 2, 1)}, "dilation must be an int or a pair"),
        ((GRAD, X, LIVE, SIZE), {"density": 1.5}, "density must be 0 to 1, got 1.5"),
    ],
)
def test_refused(given, options, words):
    with pytest.raises(RtkError, match="conv2d_bwd_weight_live: .*" + words):
        conv2d_bwd_weight_live(*given, **options)


def test_compiled_in_one_graph():
    case = CASES["3x3-odd"]
    grad, x, live, mask = case.tensors(torch.float32, "cpu")
    words = live_tiles(live)

    def backward(grad: Tensor, x: Tensor) -> Tensor:
        return conv2d_bwd_weight_live(grad, x, words, case.weight_size, *case.conv, mask=mask) * 2

    compiled = torch.compile(backward, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(grad, x), backward(grad, x))
