"""sparse_conv2d on the 3x3 layers of ResNets, both ways, against cuDNN on the same masked weight.

The weights are ready for both, and so are the lists: bench_sparse_columns says what these cost. The
FLOPs are those of the weights that are not zero, the bytes those that must move at least.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rtk.ops import backend, sparse_columns, sparse_conv2d, sparse_conv2d_bwd_input, turn_filter
from rtk.ops.sparse_columns import dense_weight

LAST = torch.channels_last
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPES = [(128, 128, 28), (128, 256, 14), (128, 512, 7), (512, 512, 4)]  # images, channels, pixels
DENSITIES = [0.1, 0.05, 0.03, 0.02, 0.01]


@dataclass(frozen=True)
class Case:
    """A 3x3 convolution of n images, c channels of size x size pixels to as many."""

    n: int
    c: int
    size: int
    granularity: str
    density: float

    def __str__(self) -> str:
        return f"{self.n}x{self.c}x{self.size}px-{self.granularity}-{self.density}"

    def activations(self) -> Tensor:
        x = torch.randn(self.n, self.c, self.size, self.size, device="cuda").bfloat16()
        return x.contiguous(memory_format=LAST)

    def weight(self) -> Tensor:
        size = (self.c, self.c, 3, 3)
        of_mask = {"element": size, "row": (self.c, self.c, 3, 1), "kernel": (self.c, self.c, 1, 1)}
        mask = torch.rand(of_mask[self.granularity], device="cuda") < self.density
        weight = torch.randn(size, device="cuda") * (9 * self.c * self.density) ** -0.5 * mask
        return weight.bfloat16().contiguous(memory_format=LAST)


CASES = [
    pytest.param(case, id=str(case))
    for shape in SHAPES
    for case in (
        *(Case(*shape, "element", density) for density in DENSITIES),
        *(Case(*shape, granularity, 0.1) for granularity in ("row", "kernel")),
    )
]


@pytest.fixture(autouse=True)
def _same_numbers_and_fastest_cudnn() -> Iterator[None]:
    torch.manual_seed(0)
    flags = torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False)
    with flags, torch.no_grad():
        yield


@pytest.mark.parametrize("peer", ["rtk", "cudnn"])
@pytest.mark.parametrize("way", ["forward", "bwd_input"])
@pytest.mark.parametrize("case", CASES)
def bench_sparse_conv2d(case, way, peer, measure, benchmark):
    benchmark.group = f"sparse_conv2d {case} {way}"
    x, weight = case.activations(), case.weight()
    conv = [1, 1], [1, 1], [1, 1], False, [0, 0], 1
    filters = weight if way == "forward" else turn_filter(weight)
    with backend("cuda"):
        columns = sparse_columns(filters)

    def rtk() -> Tensor:
        if way == "forward":
            return sparse_conv2d(x, columns, filters.shape, padding=1)
        size = x.shape[2:]
        return sparse_conv2d_bwd_input(x, columns, filters.shape, size, padding=1)

    def cudnn() -> Tensor:
        if way == "forward":
            return torch.ops.aten.convolution(x, weight, None, *conv)
        needs = [True, False, False]
        return torch.ops.aten.convolution_backward(x, x, weight, None, *conv, needs)[0]

    call = {"rtk": rtk, "cudnn": cudnn}[peer]
    wanted = F.conv2d(x.float(), filters.float(), padding=1)
    with backend("cuda"):
        torch.testing.assert_close(call().float(), wanted, rtol=2.0**-7, atol=1e-2)
        live = int((weight != 0).sum())
        moved = 2 * x.numel() * x.element_size()
        flops = 2 * live * case.n * case.size**2
        measure(call, bytes=moved, flops=flops, device="cuda")


@pytest.mark.parametrize("density", [0.1, 0.01])
def bench_sparse_columns(density, measure, benchmark):
    """The lists of 16 layers like a ResNet-18's, for both ways, in one launch."""
    benchmark.group = f"sparse_columns {density}"
    weights = [
        Case(1, c, 1, "element", density).weight() for c in (64, 128, 256, 512) for _ in "1234"
    ]
    weights += [turn_filter(weight) for weight in weights]
    with backend("cuda"):
        for weight, lists in zip(weights, sparse_columns(weights), strict=True):
            assert torch.equal(dense_weight(lists, weight.shape), weight.float())
        moved = sum(weight.numel() * weight.element_size() for weight in weights)
        measure(lambda: sparse_columns(weights), bytes=moved, device="cuda")
