"""Masked convolutions and linear layers as products of live blocks: all ways, any mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rtk.errors import RtkError
from rtk.ops import _conv_paths, _masked_linear_eager, live_blocks, prepare_weight
from rtk.ops._block_paths import BLOCK_PATHS
from rtk.ops._conv_paths import CUDNN, NO_LISTS
from rtk.ops._masked_linear_eager import CUBLAS
from rtk.ops.masked_conv2d import masked_conv2d_prepared

OUTPUTS, INPUTS = 256, 128  # of every weight here


def block_ticket(size: int) -> Tensor:
    live = torch.rand(OUTPUTS // size, INPUTS // size) < 0.4
    return live.repeat_interleave(size, 0).repeat_interleave(size, 1)


MASKS = {
    "blocks of 32": lambda: block_ticket(32),
    "blocks of 128": lambda: block_ticket(128),
    "no blocks": lambda: torch.rand(OUTPUTS, INPUTS) < 0.001,
    "half": lambda: torch.rand(OUTPUTS, INPUTS) < 0.5,
    "outputs": lambda: torch.rand(OUTPUTS, 1) < 0.1,
    "dense": lambda: torch.ones(1, 1, dtype=torch.bool),
    "dead": lambda: torch.zeros(OUTPUTS, INPUTS, dtype=torch.bool),
}
each_mask = pytest.mark.parametrize("name", MASKS)
each_path = pytest.mark.parametrize("path", BLOCK_PATHS)


ALL = ["block_matmul", "block_matmul_bwd_input", "block_matmul_bwd_weight"]


def gradients(run, leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    out = run(*leaves)
    upstream = grad.to(out.dtype)
    if out.dim() == 4:
        upstream = upstream.contiguous(memory_format=torch.channels_last)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def assert_near(found: list[Tensor], wanted: list[Tensor]) -> None:
    for i, (mine, exact) in enumerate(zip(found, wanted, strict=True)):
        scale = max(1.0, exact.abs().max().item()) if exact.numel() else 1.0
        torch.testing.assert_close(
            mine.double(), exact, rtol=2e-2, atol=1e-2 * scale, msg=lambda t, i=i: f"{i}: {t}"
        )


@each_mask
@each_path
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_a_1x1_convolution(path, name, bias, products, device):
    mask = MASKS[name]()[..., None, None].to(device)
    x = torch.randn(3, INPUTS, 5, 7, device=device).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(OUTPUTS, INPUTS, 1, 1, device=device)
    ready = prepare_weight(weight, mask, dtype=torch.bfloat16, channels_last=True)
    if name != "outputs":
        mask = mask.expand_as(weight).contiguous()
    grad = torch.randn(3, OUTPUTS, 5, 7, device=device).bfloat16()
    leaves = [x, weight] + ([torch.randn(OUTPUTS, device=device)] if bias else [])

    def ours(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        given = x, weight, mask, ready, None, bias
        out = masked_conv2d_prepared(*given, 1, 0, 1, 1, (path,) * 3)
        assert out.is_contiguous(memory_format=torch.channels_last) and not out._is_view()
        return out

    def formula(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        masked = torch.where(mask, weight, 0)
        rounded = masked + (ready.double() - masked).detach()  # its gradient is the master's
        return F.conv2d(x, rounded, bias)

    found = gradients(ours, [t.clone().requires_grad_() for t in leaves], grad)
    exact = gradients(formula, [t.double().requires_grad_() for t in leaves], grad)
    assert_near(found, exact)
    assert not found[2][~mask.expand_as(weight)].any()
    if device == "cuda" or name != "outputs":  # the operators take paths on a GPU only
        assert products == ALL


@each_path
def test_activations_in_place_may_follow_a_convolution(path):
    x = torch.randn(2, INPUTS, 3, 3).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = torch.randn(OUTPUTS, INPUTS, 1, 1, requires_grad=True)
    mask = weight.detach() > 0
    ready = prepare_weight(weight.detach(), mask, dtype=torch.bfloat16, channels_last=True)
    results = []
    for paths in (CUDNN, (path,) * 3):
        out = masked_conv2d_prepared(x, weight, mask, ready, None, None, 1, 0, 1, 1, paths)
        out.relu_()
        results.append([out.detach(), *torch.autograd.grad(out.sum(), weight)])
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-1)


@pytest.mark.parametrize("frozen", ["x", "weight", "neither"])
def test_only_what_is_needed_is_computed(frozen, products):
    x = torch.randn(2, INPUTS, 3, 3).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = torch.randn(OUTPUTS, INPUTS, 1, 1)
    mask = weight > 0
    ready = prepare_weight(weight, mask, dtype=torch.bfloat16, channels_last=True)
    x.requires_grad_(frozen != "x"), weight.requires_grad_(frozen != "weight")
    lists = [live_blocks(mask.flatten(1), 64)] * 3
    how = 1, 0, 1, 1, ("blocks64",) * 3, lists, [0.1, 0.5, 1.0]
    out = masked_conv2d_prepared(x, weight, mask, ready, None, None, *how)
    if frozen == "weight":  # the operator's, which takes paths on a GPU only
        return
    out.backward(torch.ones_like(out))
    assert products == [ALL[0], *([ALL[1]] if frozen != "x" else []), ALL[2]]


@pytest.mark.parametrize(
    ("shape", "conv", "words"),
    [
        ((64, 96, 1, 1), (1, 0), "64 outputs and 96 inputs are no multiples of 64"),
        ((64, 64, 3, 3), (1, 1), "for 1x1 filters of stride 1"),
        ((64, 64, 1, 1), (2, 0), "for 1x1 filters of stride 1"),
        ((64, 64, 1, 1), (1, 1), "padding less than the filter"),
    ],
)
def test_what_is_no_product_is_refused(shape, conv, words):
    stride, padding = conv
    weight = torch.randn(shape)
    pairs = [stride] * 2, [padding] * 2, [1, 1], 1
    assert words in _conv_paths.why_not_path("blocks64", weight, *pairs)
    given = torch.randn(2, shape[1], 4, 4), weight, weight > 0, weight, None, None
    for paths in (("blocks64", *CUDNN[1:]), (*CUDNN[:2], "blocks64")):
        with pytest.raises(RtkError, match=words):
            masked_conv2d_prepared(*given, stride, padding, 1, 1, paths)


def test_no_images_and_another_layout_are_cudnns(products):
    weight = torch.randn(OUTPUTS, INPUTS, 1, 1, requires_grad=True)
    mask = weight.detach() > 0
    ready = prepare_weight(weight.detach(), mask, dtype=torch.bfloat16, channels_last=True)
    for n, format in ((0, torch.channels_last), (2, torch.contiguous_format)):
        x = torch.randn(n, INPUTS, 3, 3).bfloat16().contiguous(memory_format=format)
        given = x, weight, mask, ready, None, None, 1, 0, 1, 1
        out = masked_conv2d_prepared(*given, ("blocks64",) * 3)
        out.sum().backward()
        torch.testing.assert_close(out, masked_conv2d_prepared(*given))
    assert products == []


@each_mask
@each_path
@pytest.mark.parametrize("leading", [(5,), (2, 3), (1,), ()], ids=str)
def test_a_linear_layer(path, name, leading, products, device):
    mask = MASKS[name]().to(device)
    weight, bias = torch.randn(OUTPUTS, INPUTS, device=device), torch.randn(OUTPUTS, device=device)
    x = torch.randn(*leading, INPUTS, device=device).bfloat16()
    grad = torch.randn(*leading, OUTPUTS, device=device).bfloat16()
    ready = prepare_weight(weight, mask, dtype=torch.bfloat16)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = _masked_linear_eager.linear(x, weight, mask, bias, (path,) * 3, NO_DENSITY)
        assert out is not None and out.dtype == torch.bfloat16
        return out

    def formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        masked = torch.where(mask, weight, 0)
        return F.linear(x, masked + (ready.double() - masked).detach(), bias)

    leaves = [x, weight, bias]
    found = gradients(ours, [t.clone().requires_grad_() for t in leaves], grad)
    assert_near(found, gradients(formula, [t.double().requires_grad_() for t in leaves], grad))
    assert [t.dtype for t in found[2:]] == [torch.float32] * 2
    assert not found[2][~mask.expand_as(weight)].any()
    assert products == ALL


NO_DENSITY = [0.25] * 3


@pytest.mark.parametrize("way", range(3))
def test_the_ways_of_a_linear_layer_choose_apart(way, products):
    x, weight = torch.randn(4, INPUTS).bfloat16(), torch.randn(OUTPUTS, INPUTS)
    mask = MASKS["blocks of 32"]()
    paths = [*CUBLAS]
    paths[way] = "blocks32"
    results = []
    for each in (CUBLAS, paths):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        out = _masked_linear_eager.linear(*leaves, mask, None, each, NO_DENSITY)
        results.append([out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)])
    torch.testing.assert_close(*results, rtol=2e-2, atol=5.0)
    assert products == [ALL[way]]


def test_a_linear_layer_without_gradients_makes_one_list(products, monkeypatch):
    made = []
    find = _masked_linear_eager.blocks_of
    monkeypatch.setattr(
        _masked_linear_eager, "blocks_of", lambda path, w: made.append(path) or find(path, w)
    )
    weight = torch.randn(OUTPUTS, INPUTS, requires_grad=True)
    given = torch.randn(4, INPUTS).bfloat16(), weight, weight > 0, None
    with torch.no_grad():
        out = _masked_linear_eager.linear(*given, ("blocks64", "blocks32", "blocks32"), NO_DENSITY)
    assert not out.requires_grad and made == ["blocks64"] and products == ALL[:1]


def test_what_a_linear_layer_leaves_to_pytorch():
    weight = torch.randn(OUTPUTS, INPUTS)
    x, mask, paths = torch.randn(4, INPUTS).bfloat16(), weight > 0, ("blocks64",) * 3

    def takes(x: Tensor, weight: Tensor, mask: Tensor) -> bool:
        found = _masked_linear_eager.linear(x, weight, mask, None, paths, NO_DENSITY)
        return found is not None

    assert takes(x, weight, mask)
    assert not takes(x.float(), weight, mask)
    assert not takes(x[:0], weight, mask)
    assert not takes(x, weight, mask.float())
    assert not takes(x, weight.half(), mask)
    assert not takes(x[:, :32], weight, mask)
    with torch.autograd.profiler.profile():
        assert not takes(x, weight, mask)
    with torch.autocast("cpu", torch.bfloat16):
        assert takes(x.float(), weight, mask)
    with torch.autocast("cpu", torch.float16):
        assert not takes(x.float(), weight, mask)


@pytest.mark.gpu
@each_path
@pytest.mark.parametrize("made_before", [True, False])
def test_the_operators_on_a_gpu(path, made_before):
    """Compiled, a convolution takes its path by the operators."""
    weight = torch.randn(OUTPUTS, INPUTS, 1, 1, device="cuda")
    mask = MASKS["blocks of 32"]()[..., None, None].cuda()
    ready = prepare_weight(weight, mask, dtype=torch.bfloat16, channels_last=True)
    x = torch.randn(3, INPUTS, 5, 7, device="cuda").bfloat16()
    x = x.contiguous(memory_format=torch.channels_last)
    lists = [live_blocks(mask.flatten(1), BLOCK_PATHS[path])] * 3 if made_before else NO_LISTS

    def run(x: Tensor, weight: Tensor, paths: tuple[str, ...]) -> Tensor:
        how = 1, 0, 1, 1, paths, lists if paths != CUDNN else NO_LISTS
        return masked_conv2d_prepared(x, weight, mask, ready, None, None, *how).relu()

    compiled = torch.compile(run, fullgraph=True)
    results = []
    for function, paths in ((run, CUDNN), (compiled, (path,) * 3)):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        out = function(*leaves, paths)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        results.append([t.float() for t in (out.detach(), *grads)])
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-1)
