"""sparse_columns: lists that hold exactly the weights that are not zero, in the kernel's order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rtk.errors import RtkError
from rtk.ops import backend as forced
from rtk.ops import sparse_columns
from rtk.ops._registry import ops
from rtk.ops.sparse_columns import dense_weight, listed_share, lists_shape

OP = "sparse_columns"
LAST = torch.channels_last
HEADER, STEP, STEP_WORDS = 4, 32, 288
SHAPES = [(16, 32, 3, 3), (40, 200, 3, 3), (24, 8, 1, 1), (64, 256, 2, 3), (17, 130, 3, 1)]
SHAPES += [(3, 1, 3, 3), (1, 129, 1, 2)]
DENSITIES = [0, 0.01, 0.1, 1]


def sparse(shape: tuple[int, ...], density: float) -> Tensor:
    weight = torch.randn(shape) * (torch.rand(shape) < density)
    return weight.bfloat16()


def words(lists: Tensor) -> list[list[int]]:
    """Return each list's words, up to its last step: what follows is undefined."""
    lists = lists.cpu()
    return [row[: HEADER + row[0] * STEP_WORDS].tolist() for row in lists]


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lists_hold_the_weight(shape, density, backend, device):
    weight = sparse(shape, density).to(device)
    wide = weight.repeat_interleave(2, 1)[:, ::2]
    with forced("reference"):
        wanted = words(sparse_columns(weight))
    for given in (weight, weight.contiguous(memory_format=LAST), wide):
        lists = sparse_columns(given)
        assert lists.shape == lists_shape(shape) and lists.is_contiguous()
        assert torch.equal(dense_weight(lists, shape), weight.float())
        assert words(lists) == wanted


def test_steps_are_of_live_columns_of_a_panel():
    weight = torch.zeros(32, 256, 3, 3, dtype=torch.bfloat16)
    weight[:16, 5] = 1  # nine columns of the first panel and chunk, whatever their sixteen rows
    weight[20, 128:161, 1, 1] = 1  # thirty-three of the second panel and chunk
    lists = sparse_columns(weight)
    assert lists[:, 0].tolist() == [1, 0, 0, 2]
    places = lists[0, HEADER : HEADER + STEP]
    assert sorted(set(places.tolist())) == [
        (9 * r + s) * 128 + 5 for r in range(3) for s in range(3)
    ]
    assert listed_share(lists, (32, 256, 3, 3)) == pytest.approx(3 * 32 / (2 * 256 * 9))


def test_eight_columns_that_are_read_together_lie_in_different_banks():
    lists = sparse_columns(torch.ones(16, 128, 3, 3, dtype=torch.bfloat16))
    places = lists[0, HEADER:].view(-1, STEP_WORDS)[:, :STEP].reshape(-1, 8)
    channel, tap = places % 128, places // 128
    for pitch in (55, 87):  # of csrc/cuda/sparse_conv2d.cu
        banks = (channel * pitch + channel // 8 + tap) % 8
        assert torch.equal(banks.sort(1).values, torch.arange(8).expand_as(banks))


def test_many_weights_are_as_one_at_a_time(backend, device):
    weights = [sparse(SHAPES[i % len(SHAPES)], 0.05).to(device) for i in range(70)]
    for weight, lists in zip(weights, sparse_columns(weights), strict=True):
        assert words(lists) == words(sparse_columns(weight))
    assert sparse_columns([]) == []


def test_nan_lives_and_minus_zero_does_not(backend, device):
    weight = torch.zeros(16, 16, 1, 1, dtype=torch.bfloat16, device=device)
    weight[3, 5], weight[4, 7] = torch.nan, -0.0
    lists = sparse_columns(weight)
    assert lists[0, 0] == 1
    assert set(lists[0, HEADER : HEADER + STEP].tolist()) == {5}
    assert dense_weight(lists, weight.shape).isnan().nonzero().tolist() == [[3, 5, 0, 0]]


def test_opcheck_and_no_gradient(backend, device):
    weight = sparse((24, 40, 3, 3), 0.1).to(device).requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if backend == "reference":  # what is undefined differs from call to call
        tests += ("test_aot_dispatch_dynamic",)
    torch.library.opcheck(ops[OP].overload, ([weight],), test_utils=tests)
    assert not sparse_columns(weight).requires_grad


@pytest.mark.gpu
def test_a_graph_follows_the_mask():
    shape = (256, 136, 3, 3)
    weight = sparse(shape, 0.1).cuda()
    with forced("cuda"):
        sparse_columns(weight)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            lists = sparse_columns(weight)
    for density in (0.02, 0, 1):
        weight.copy_(sparse(shape, density))
        graph.replay()
        assert torch.equal(dense_weight(lists, shape), weight.float())


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(3, 4, 3, 3), "must be torch.bfloat16, got torch.float32; use prepare_weight"),
        (torch.ones(3, 4, 3).bfloat16(), r"must be \(K, C, R, S\).*got \(3, 4, 3\)"),
        (torch.ones(3, 0, 3, 3).bfloat16(), r"none of them 0.*got \(3, 0, 3, 3\)"),
        (torch.ones(3, 4, 3, 4).bfloat16(), r"R and S at most 3, got \(3, 4, 3, 4\)"),
    ],
    ids=str,
)
def test_refused(weight, message):
    with pytest.raises(RtkError, match=f"sparse_columns: .*{message}"):
        sparse_columns(weight)
    with FakeTensorMode() as mode, pytest.raises(RtkError, match=message):
        sparse_columns(mode.from_tensor(weight))


def test_weights_of_two_devices_are_refused():
    weight = sparse((3, 4, 1, 1), 1)
    with pytest.raises(RtkError, match="weights are on cpu and meta; call it once a device"):
        sparse_columns([weight, weight.to("meta")])
