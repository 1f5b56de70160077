"""sparse_conv2d: F.conv2d with the weight that the lists hold, forward and input gradient."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rtk.errors import RtkError
from rtk.ops import backend as forced
from rtk.ops import sparse_columns, sparse_conv2d, sparse_conv2d_bwd_input, turn_filter
from rtk.ops._registry import ops

OP = "sparse_conv2d"
LAST = torch.channels_last
MASKS = {"element": (1, 1, 1, 1), "row": (1, 1, 1, 0), "kernel": (1, 1, 0, 0)}


def normal(*shape: int, device: str = "cpu") -> Tensor:
    return torch.randn(shape, device=device).bfloat16()


def sparse(
    shape: tuple[int, ...], density: float, granularity: str = "element", device: str = "cpu"
) -> Tensor:
    """Return a weight (K, C, R, S) of about the scale that layers have."""
    of_mask = [n if each else 1 for n, each in zip(shape, MASKS[granularity], strict=True)]
    kept = torch.rand(of_mask, device=device) < density
    weight = torch.randn(shape, device=device) * kept
    fan_in = max(1.0, density * weight[0].numel())
    return (weight * fan_in**-0.5).bfloat16()


def close(out: Tensor, wanted: Tensor) -> None:
    assert out.shape == wanted.shape and out.dtype == torch.bfloat16
    assert out.is_contiguous(memory_format=LAST)
    torch.testing.assert_close(out.float(), wanted.float(), rtol=2.0**-7, atol=1e-2)


@dataclass(frozen=True)
class Case:
    n: int
    c: int
    size: tuple[int, int]
    k: int
    filter: tuple[int, int] = (3, 3)
    stride: int = 1
    padding: int = 1
    density: float = 0.03
    granularity: str = "element"
    bias: bool = False

    def check(self, device: str) -> None:
        """Compare both ways with what PyTorch gives in fp32."""
        shape = self.k, self.c, *self.filter
        weight = sparse(shape, self.density, self.granularity, device)
        x = normal(self.n, self.c, *self.size, device=device).contiguous(memory_format=LAST)
        bias = torch.randn(self.k, device=device) if self.bias else None
        options = {"stride": self.stride, "padding": self.padding}
        leaf = x.float().requires_grad_()
        wanted = F.conv2d(leaf, weight.float(), bias, **options)
        close(sparse_conv2d(x, sparse_columns(weight), weight.shape, bias, **options), wanted)
        if self.filter[0] != self.filter[1]:
            return
        grad = normal(*wanted.shape, device=device).contiguous(memory_format=LAST)
        wanted.backward(grad.float())
        turned = turn_filter(weight)
        columns = sparse_columns(turned)
        out = sparse_conv2d_bwd_input(grad, columns, turned.shape, self.size, **options)
        assert leaf.grad is not None
        close(out, leaf.grad)


CASES = {
    "3x3": Case(2, 136, (7, 7), 24, bias=True),
    "3x3-tall": Case(3, 8, (9, 5), 40, padding=0),
    "3x3-stride-2": Case(2, 24, (9, 8), 16, stride=2, bias=True),
    "1x1": Case(2, 40, (6, 5), 24, (1, 1), padding=0, density=0.2),
    "1x1-stride-2": Case(2, 24, (7, 8), 40, (1, 1), 2, 0, density=0.2),
    "2x3": Case(1, 16, (7, 7), 24, (2, 3), padding=2, density=0.3),
    "dead": Case(2, 16, (4, 4), 16, density=0, bias=True),
    "dense": Case(9, 16, (4, 4), 16, density=1),
    "rows": Case(2, 32, (8, 8), 32, density=0.1, granularity="row"),
    "kernels": Case(2, 32, (8, 8), 32, density=0.1, granularity="kernel"),
    "one-pixel": Case(1, 16, (1, 1), 16, density=0.5),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_convolution(name, backend, device):
    CASES[name].check(device)


def test_channels_that_the_kernel_does_not_take(device):
    Case(2, 5, (6, 6), 7, density=0.3).check(device)


@pytest.mark.gpu
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("filter", [3, 1])
@pytest.mark.parametrize("channels", [(128, 128), (256, 512), (512, 256), (136, 200), (264, 72)])
def test_layers_of_networks(channels, filter, stride):
    c, k = channels
    with forced("cuda"):
        for n, size in ((13, (14, 14)), (5, (28, 28)), (16, (7, 7)), (70, (4, 4)), (3, (9, 17))):
            for density in (0, 0.01, 0.1, 1):
                square = (filter, filter)
                Case(n, c, size, k, square, stride, filter // 2, density, bias=n == 5).check("cuda")
            for granularity in ("row", "kernel"):
                Case(n, c, size, k, square, stride, filter // 2, 0.1, granularity).check("cuda")


@pytest.mark.gpu
def test_many_blocks_and_few():
    """A batch that fills the GPU takes other tiles than one that does not."""
    with forced("cuda"):
        for n, channels, size in ((128, 256, 14), (128, 512, 7), (8, 512, 7), (128, 128, 28)):
            Case(n, channels, (size, size), channels, density=0.02).check("cuda")


@pytest.mark.gpu
def test_a_graph_follows_the_mask():
    x = normal(5, 136, 9, 9).cuda().contiguous(memory_format=LAST)
    weight = sparse((72, 136, 3, 3), 0.1).cuda()

    def call() -> Tensor:
        return sparse_conv2d(x, sparse_columns(weight), weight.shape, padding=1)

    with forced("cuda"):
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
    for density in (0.02, 0, 1):
        weight.copy_(sparse(tuple(weight.shape), density))
        graph.replay()
        close(out, F.conv2d(x.float(), weight.float(), padding=1))


@pytest.mark.gpu
def test_views_that_do_not_begin_at_sixteen_bytes():
    weight = sparse((16, 8, 3, 3), 0.2).cuda()
    storage = normal(1 + 2 * 8 * 5 * 5).cuda()
    x = storage[1:].view(2, 5, 5, 8).permute(0, 3, 1, 2)
    with forced("cuda"):
        out = sparse_conv2d(x, sparse_columns(weight), weight.shape, padding=1)
    close(out, F.conv2d(x.float(), weight.float(), padding=1))


def test_no_images(backend, device):
    columns = sparse_columns(sparse((16, 8, 3, 3), 0.2).to(device))
    out = sparse_conv2d(normal(0, 8, 5, 6).to(device), columns, (16, 8, 3, 3), padding=1)
    assert out.shape == (0, 16, 5, 6)


def test_opcheck_and_no_gradient(backend, device):
    columns = sparse_columns(sparse((16, 8, 3, 3), 0.2).to(device))
    x = normal(2, 8, 5, 6).to(device).requires_grad_()
    args = (x, columns, [16, 8, 3, 3], torch.randn(16, device=device), 1, 1, 2, [10, 11])
    torch.library.opcheck(ops[OP].overload, args)
    assert not sparse_conv2d(x, columns, (16, 8, 3, 3)).requires_grad


def test_one_compiled_graph():
    weight, x = sparse((16, 8, 3, 3), 0.2), normal(2, 8, 5, 6)

    def call(x: Tensor) -> Tensor:
        return sparse_conv2d(x, sparse_columns(weight), weight.shape, padding=1)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), call(x))


X, SIZE = torch.ones(2, 8, 5, 6).bfloat16(), (16, 8, 3, 3)
COLUMNS = sparse_columns(torch.ones(SIZE).bfloat16())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": X.float()}, "input must be torch.bfloat16, got torch.float32"),
        ({"input": X[:, :4]}, r"input must be \(N, C, H, W\) with C = 8.*got \(2, 4, 5, 6\)"),
        ({"size": (16, 8, 3)}, r"size must be \(K, C, R, S\)"),
        ({"size": (16, 8, 3, 5)}, r"R and S at most 3, got \(16, 8, 3, 5\)"),
        ({"columns": COLUMNS[:, 1:]}, r"columns must be .* make it with sparse_columns\(weight\)"),
        ({"columns": COLUMNS.long()}, "torch.int32 .* torch.int64"),
        ({"columns": COLUMNS.to("meta")}, "input is on cpu and columns on meta; move one"),
        ({"bias": torch.ones(8)}, r"bias must be \(K,\) = \(16,\)"),
        ({"bias": torch.ones(16).double()}, "fp32 or bf16"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"padding": -1}, "padding must be at least 0, got -1"),
        ({"upsample": 3}, "upsample must be 1, or 2 with stride 1, got 3"),
        ({"upsample": 2, "stride": 2}, "upsample must be 1, or 2 with stride 1"),
        ({"out_size": [4, 4]}, r"out_size is at most \(3, 4\) here, got \(4, 4\)"),
        ({"input": X[..., :2]}, r"the output must be at least 1 x 1, got \(3, 0\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused(changes, message):
    given = {"input": X, "columns": COLUMNS, "size": SIZE} | changes
    with pytest.raises(RtkError, match=f"sparse_conv2d: .*{message}"):
        sparse_conv2d(**given)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(RtkError, match=message):
        fake = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in given.items()}
        sparse_conv2d(**fake)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (8, 16, 3, 1)}, r"size must be \(C, K, R, R\), got \(8, 16, 3, 1\)"),
        ({"padding": 3}, "padding must be 0 to R - 1 = 2, got 3"),
    ],
)
def test_input_gradient_refuses(changes, message):
    given = {"size": (16, 8, 3, 3), "input_size": (5, 6), "padding": 1} | changes
    with pytest.raises(RtkError, match=f"sparse_conv2d_bwd_input: {message}"):
        sparse_conv2d_bwd_input(X, COLUMNS, **given)
