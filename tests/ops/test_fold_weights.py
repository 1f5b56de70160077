"""fold_weights: the folded layer is a convolution and a batch norm; CUDA gives the same bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rtk.errors import RtkError
from rtk.ops import FoldLayer, FoldPlan, turn_filter
from rtk.ops import backend as forced

LAST = torch.channels_last
LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels-last": lambda t: t.contiguous(memory_format=LAST),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
}
MASKS = {
    "dense": None,
    "element": lambda k, c, r, s: (k, c, r, s),
    "row": lambda k, c, r, s: (k, c, r, 1),
    "kernel": lambda k, c, r, s: (k, c, 1, 1),
    "channel": lambda k, c, r, s: (k, 1, 1, 1),
}
PARTS = {
    "nothing": (),
    "bias": ("bias",),
    "norm": ("mean", "var", "gamma", "beta"),
    "norm-and-bias": ("mean", "var", "gamma", "beta", "bias"),
    "norm-without-affine": ("mean", "var"),
}
SHAPES = [
    (64, 64, 1, 1),
    (64, 3, 7, 7),
    (64, 64, 3, 3),
    (136, 72, 3, 3),
    (72, 200, 1, 1),
    (33, 7, 3, 3),
    (5, 66, 1, 1),
    (40, 36, 5, 5),
    (48, 44, 1, 3),
    (1, 8, 3, 3),
    (32, 1, 9, 1),
]


def layer(
    shape: tuple[int, int, int, int],
    parts: str = "norm",
    mask: str = "dense",
    layout: str = "contiguous",
    mask_layout: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> FoldLayer:
    k = shape[0]
    tensors: dict[str, Tensor] = {name: torch.randn(k) for name in PARTS[parts]}
    if "var" in tensors:
        tensors["var"] = tensors["var"].square() + 0.1
    tensors["weight"] = LAYOUTS[layout](torch.randn(shape))
    tensors = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
    if MASKS[mask] is not None:
        kept = torch.rand(MASKS[mask](*shape)) < 0.5
        tensors["mask"] = LAYOUTS[mask_layout or layout](kept).to(device)
    return FoldLayer(**tensors, eps=1e-3)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("parts", PARTS)
def test_it_is_a_convolution_and_a_batch_norm(parts, mask, stride):
    given = layer((6, 4, 3, 3), parts, mask, dtype=torch.float64)
    (folded,) = FoldPlan([given], dtype=torch.float64)()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64, requires_grad=True)
    weight = given.weight if given.mask is None else given.weight * given.mask
    wanted = F.conv2d(x, weight, given.bias, stride, 1)
    if given.mean is not None:
        wanted = F.batch_norm(wanted, given.mean, given.var, given.gamma, given.beta, eps=given.eps)
    out = F.conv2d(x, folded.weight, folded.bias, stride, 1)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    # The turned weight is the one of the input gradient.
    grad = torch.randn_like(wanted)
    wanted.backward(grad)
    if stride == 1:
        mine = F.conv2d(grad, folded.turned, padding=1)
        torch.testing.assert_close(mine, x.grad, rtol=1e-12, atol=1e-12)
    assert torch.equal(folded.turned, turn_filter(folded.weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_result_is_rounded_once(dtype, device):
    given = layer((6, 4, 3, 3), "norm-and-bias", "element", device=device)
    with forced("reference"):
        (folded,) = FoldPlan([given], dtype=dtype)()
        (exact,) = FoldPlan([given], dtype=torch.float32)()
    assert folded.weight.dtype == folded.turned.dtype == dtype
    assert folded.bias.dtype == torch.float32
    assert torch.equal(folded.weight, exact.weight.to(dtype))
    assert torch.equal(folded.bias, exact.bias)


def test_results_are_channels_last_in_one_arena_and_stay_where_they_are(device):
    plan = FoldPlan([layer(shape, device=device) for shape in SHAPES])
    folded = plan()
    places = [(f.weight.data_ptr(), f.turned.data_ptr(), f.bias.data_ptr()) for f in folded]
    for f, (k, c, r, s) in zip(folded, SHAPES, strict=True):
        assert f.weight.shape == (k, c, r, s) and f.turned.shape == (c, k, r, s)
        assert f.weight.permute(0, 2, 3, 1).is_contiguous()
        assert f.turned.permute(0, 2, 3, 1).is_contiguous()
    assert all(address % 64 == 0 for place in places for address in place)
    assert len({f.weight.untyped_storage().data_ptr() for f in folded}) == 1
    assert len({f.bias.untyped_storage().data_ptr() for f in folded}) == 1
    assert [(f.weight.data_ptr(), f.turned.data_ptr(), f.bias.data_ptr()) for f in plan()] == places


def test_a_call_reads_what_the_tensors_hold_by_then(device):
    given = layer((16, 8, 3, 3), "norm-and-bias", "element", device=device)
    plan = FoldPlan([given])
    before = plan()[0].weight.clone()
    for tensor in (given.weight, given.gamma, given.bias):
        tensor.mul_(-2)
    given.mask.logical_not_()
    after = plan()[0]
    (wanted,) = FoldPlan([given])()
    assert not torch.equal(after.weight, before)
    assert torch.equal(after.weight, wanted.weight) and torch.equal(after.bias, wanted.bias)


def test_a_parameter_that_got_new_memory_is_found(device):
    weight = torch.nn.Parameter(torch.randn(8, 8, 3, 3, device=device))
    plan = FoldPlan([FoldLayer(weight)])
    plan()
    weight.data = torch.randn(8, 8, 3, 3, device=device)
    (folded,) = plan()
    assert torch.equal(folded.weight, weight.detach().bfloat16())
    assert not folded.weight.requires_grad


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -1.0])
def test_pruned_is_plus_zero_whatever_the_master_holds(poison, device):
    given = layer((8, 8, 3, 3), "norm", "element", device=device)
    given.weight.masked_fill_(~given.mask, poison)
    (folded,) = FoldPlan([given])()
    pruned = folded.weight[~given.mask]
    assert torch.equal(pruned, torch.zeros_like(pruned)) and not pruned.signbit().any()
    assert folded.weight[given.mask].ne(0).all()


def assert_same_bits(layers: list[FoldLayer]) -> None:
    with forced("reference"):
        wanted = FoldPlan(layers)()
    with forced("cuda"):
        folded = FoldPlan(layers)()
    for given, mine, reference in zip(layers, folded, wanted, strict=True):
        where = tuple(given.weight.shape), given.weight.stride()
        assert torch.equal(mine.bias, reference.bias), where
        assert torch.equal(mine.weight, reference.weight), where
        assert torch.equal(mine.turned, reference.turned), where


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("parts", PARTS)
def test_cuda_gives_the_bits_of_the_reference(parts, mask, layout):
    assert_same_bits([layer(shape, parts, mask, layout, device="cuda") for shape in SHAPES])


@pytest.mark.gpu
@pytest.mark.parametrize("mask_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_takes_a_mask_in_another_layout_and_at_odd_addresses(layout, mask_layout):
    layers = [
        layer(shape, "norm", "element", layout, mask_layout, device="cuda") for shape in SHAPES
    ]
    assert_same_bits(layers)

    def shifted(tensor: Tensor) -> Tensor:
        memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
        return memory[1:].as_strided(tensor.shape, tensor.stride()).copy_(tensor)

    assert_same_bits([replace(g, weight=shifted(g.weight)) for g in layers])
    assert_same_bits([replace(g, mask=shifted(g.mask)) for g in layers])


@pytest.mark.gpu
def test_cuda_takes_more_layers_than_a_block_has_threads():
    shapes = [(8 + i % 3, 4 + i % 5, 1 + i % 3, 1 + i % 2) for i in range(600)]
    assert_same_bits([layer(shape, "norm", device="cuda") for shape in shapes])


@pytest.mark.gpu
def test_a_graph_follows_the_weights_and_refuses_the_first_call():
    layers = [layer(shape, "norm-and-bias", "element", device="cuda") for shape in SHAPES]
    plan = FoldPlan(layers)
    message = "call the plan once before"
    with pytest.raises(RtkError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
        plan()
    plan()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan()
    for _ in range(2):
        for given in layers:
            given.weight.copy_(torch.randn_like(given.weight))
            given.mean.copy_(torch.randn_like(given.mean))
            given.mask.logical_not_()
        graph.replay()
        with forced("reference"):
            wanted = FoldPlan(layers)()
        for mine, reference in zip(plan.folded, wanted, strict=True):
            assert torch.equal(mine.weight, reference.weight)
            assert torch.equal(mine.turned, reference.turned)
            assert torch.equal(mine.bias, reference.bias)


W, V = torch.ones(4, 3, 2, 2), torch.ones(4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"weight": W[0]}, r"weight must be \(K, C, R, S\).* got \(3, 2, 2\)"),
        ({"weight": W[:0]}, r"nothing of it 0, got \(0, 3, 2, 2\)"),
        ({"weight": W.int()}, "weight must be floating, got torch.int32"),
        ({"mask": W}, "mask must be bool, got torch.float32; use mask.bool"),
        ({"mask": W[:, :, 0, 0] > 0}, r"mask must broadcast to \(K, C, R, S\).*got \(4, 3\); use"),
        ({"mask": W.to("meta") > 0}, "mask is on meta and weight on cpu"),
        ({"mean": V}, "mean and var come together"),
        ({"gamma": V}, "gamma and beta need mean and var"),
        ({"bias": V[:3]}, r"bias must be \(K,\) = \(4,\), got \(3,\)"),
        (
            {"mean": V, "var": V.double()},
            "var is torch.float64 on cpu and the weight torch.float32",
        ),
        ({"eps": -1.0}, "eps must be at least 0, got -1.0"),
    ],
    ids=str,
)
def test_a_layer_refuses(given, words):
    with pytest.raises(RtkError, match=f"fold_weights: .*{words}"):
        FoldLayer(**{"weight": W} | given)


def test_a_plan_refuses():
    with pytest.raises(RtkError, match="there are no layers"):
        FoldPlan([])
    with pytest.raises(RtkError, match=r"must be torch\.float32 on cpu, got torch\.float64"):
        FoldPlan([FoldLayer(W), FoldLayer(W.double())])
    with pytest.raises(RtkError, match=r"dtype must be floating, got torch\.int8"):
        FoldPlan([FoldLayer(W)], dtype=torch.int8)
    with forced("triton"), pytest.raises(RtkError, match="there is no backend 'triton'"):
        FoldPlan([FoldLayer(W)])()
    with forced("cuda"), pytest.raises(RtkError, match="the forced backend 'cuda' cannot"):
        FoldPlan([FoldLayer(W)])()
