"""Masked layers that `tune` gave products of live blocks: the same through copies and modes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import rtk
from rtk.nn import MaskedLinear, _prepare, mask_model
from rtk.ops import live_blocks

PATHS = ("blocks32", "blocks64", "blocks32")


ALL = ["block_matmul", "block_matmul_bwd_input", "block_matmul_bwd_weight"]


def linear(device: str = "cpu", shape: tuple[int, ...] = (3, 64)) -> tuple[MaskedLinear, Tensor]:
    layer = MaskedLinear(64, 128, mask=torch.rand(128, 64) < 0.3).to(device)
    layer._paths_for[shape] = layer._eager_paths_for[shape] = PATHS
    return layer, torch.randn(shape, device=device)


def run(layer: nn.Module, x: Tensor, device: str = "cpu") -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        out = layer(leaf)
    parameters = [leaf, *layer.parameters()]
    return [out.detach().float(), *torch.autograd.grad(out.float().square().sum(), parameters)]


def untuned(layer: nn.Module) -> nn.Module:
    plain = copy.deepcopy(layer)
    for module in plain.modules():
        if hasattr(module, "_paths_for"):
            module._paths_for.clear()
            module._eager_paths_for.clear()
    return plain


def assert_near(found: list[Tensor], wanted: list[Tensor]) -> None:
    for mine, other in zip(found, wanted, strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        scale = other.abs().max().item()
        torch.testing.assert_close(mine, other, rtol=2e-2, atol=2e-2 * scale)


@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 64), (64,)], ids=str)
def test_a_linear_layer_is_the_same_on_its_paths(shape, products, device):
    layer, x = linear(device, shape)
    wanted = run(untuned(layer), x, device)
    assert products == []
    assert_near(run(layer, x, device), wanted)
    assert products == ALL


def test_another_shape_precision_or_mode_is_as_before(products):
    layer, x = linear()
    plain = untuned(layer)
    assert torch.equal(layer(x), plain(x))
    assert_near(run(layer, x[:2]), run(plain, x[:2]))
    assert layer(x[:0].bfloat16()).shape == (0, 128)
    layer.set_mask(nn.Parameter(torch.rand(128, 64)))
    assert_near(run(layer, x), run(untuned(layer), x))
    assert products == []


def test_a_compiled_linear_layer_is_in_one_piece(products):
    torch._dynamo.reset()
    layer, x = linear()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_near(run(compiled, x), run(untuned(layer), x))
    assert products == []


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["deepcopy", "pickle"],
)
def test_copies_keep_their_paths_apart(duplicate, products):
    layer, x = linear()
    other = duplicate(layer)
    assert_near(run(other, x), run(layer, x))
    assert products == ALL * 2
    other._paths_for.clear()
    assert layer._paths_for and layer.fold()(x).shape == (3, 128)


def test_a_mask_that_changes_is_followed_at_once(products):
    layer, x = linear()
    for density in (0.0, 0.01, 1.0):
        layer.mask.copy_(torch.rand(128, 64) < density)
        layer.weight.data.normal_()
        found = run(layer, x)
        assert_near(found, run(untuned(layer), x))
        assert not found[2][~layer.mask].any()
    assert products == ALL * 3


def test_a_backward_after_the_mask_changed_fails():
    layer, x = linear()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x.requires_grad_())
    layer.mask.logical_not_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.float().sum().backward()


@pytest.fixture
def together(monkeypatch):
    """Prepare the convolutions of a model together on the CPU too, as is done on a GPU only."""
    monkeypatch.setattr(_prepare, "_wanted", lambda: torch.is_autocast_enabled("cpu"))
    monkeypatch.setattr(_prepare, "_serves", lambda layer: True)


def network(device: str = "cpu") -> tuple[nn.Module, Tensor]:
    between = nn.LeakyReLU(0.99, inplace=True)  # no kink that a rounding error falls over
    layers = [nn.Conv2d(64, 128, 1), between, nn.Conv2d(128, 64, 1, bias=False)]
    model = nn.Sequential(*layers).to(device, memory_format=torch.channels_last)
    masks = {name: torch.rand(model.get_submodule(name).weight.shape) < 0.1 for name in "02"}
    mask_model(model, rtk.Ticket(masks))
    x = torch.randn(3, 64, 5, 7, device=device).contiguous(memory_format=torch.channels_last)
    for name, channels in (("0", 64), ("2", 128)):
        layer = model.get_submodule(name)
        layer._paths_for[3, channels, 5, 7] = layer._eager_paths_for[3, channels, 5, 7] = PATHS
        layer._densities.update({"blocks32": 0.9, "blocks64": 1.0})
    return model, x


def test_a_model_prepares_its_blocks(together, products):
    model, x = network()
    found = []
    for name in "02":
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(lambda m, _: found.append(m._prepared))
    assert_near(run(model, x), run(untuned(model), x))
    # Autograd is lazy: the second convolution's way back comes before the first's.
    assert products == [*ALL[:1] * 2, *ALL[1:] * 2]
    for ready, name in zip(found[:2], "02", strict=True):
        mask, weight = model.get_submodule(name).mask.flatten(1), ready.weight.flatten(1)
        wanted = {
            ("blocks32", False): live_blocks(mask, 32),
            ("blocks64", False): live_blocks(weight, 64),
        }
        assert ready.lists.keys() == wanted.keys()
        assert all(torch.equal(ready.lists[key], wanted[key]) for key in wanted)
        assert ready.lists_for(PATHS)[1] is ready.lists["blocks64", False]


@pytest.mark.gpu
def test_a_model_on_a_gpu(products):
    model, x = network("cuda")
    wanted = run(untuned(model), x, "cuda")
    assert_near(run(model, x, "cuda"), wanted)
    assert products == [*ALL[:1] * 2, *ALL[1:] * 2]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 64), (64,), (1000, 64)], ids=str)
def test_a_graphed_linear_layer_follows_its_mask(shape):
    layer, x = linear("cuda", shape)

    def step() -> list[Tensor]:
        return run(layer, x, "cuda")

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for density in (0.0, 0.01, 1.0):
        layer.mask.copy_(torch.rand(128, 64) < density)
        layer.weight.data.normal_()
        graph.replay()
        assert_near([t.clone() for t in captured], run(untuned(layer), x, "cuda"))
