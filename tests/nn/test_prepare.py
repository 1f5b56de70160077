"""Masked layers prepared together: the same numbers, fresh in every forward, none left behind."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import rtk
from rtk.nn import MaskedConv2d, _prepare, fold, mask_model
from rtk.ops import live_tiles, sparse_columns

LAST = torch.channels_last


def small(device="cpu"):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(16, 8, 1, bias=False),
    ).to(device, memory_format=LAST)
    masks = {
        name: torch.rand_like(layer.weight) < 0.5
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d)
    }
    return mask_model(model, rtk.Ticket(masks, {"granularity": "element"}))


def images(device="cpu"):
    return torch.randn(4, 3, 9, 9, device=device).contiguous(memory_format=LAST)


def layers(model):
    return [m for m in model.modules() if isinstance(m, MaskedConv2d)]


@pytest.fixture
def together(monkeypatch):
    """Do on the CPU what is done on a GPU only."""
    on_gpu = _prepare._serves
    monkeypatch.setattr(_prepare, "_wanted", lambda: torch.is_autocast_enabled("cpu"))
    monkeypatch.setattr(
        _prepare, "_serves", lambda layer: on_gpu(layer) or not layer.weight.is_cuda
    )


def run(model, x, device="cpu"):
    with torch.autocast(device, torch.bfloat16):
        out = model(x)
    parameters = list(model.parameters())
    return out, *torch.autograd.grad(out.float().square().sum(), parameters)


def apart(model, x, device="cpu"):
    alone = copy.deepcopy(model)
    _prepare.prepare_apart(alone)
    return run(alone, x, device)


def seen(model):
    """Record which layers had a prepared weight when they ran."""
    ready = []
    for layer in layers(model):
        layer.register_forward_pre_hook(lambda m, _: ready.append(m._prepared is not None))
    return ready


def test_together_is_the_same_as_apart(together):
    model, x = small(), images()
    ready = seen(model)
    torch.testing.assert_close(run(model, x), apart(model, x), rtol=0, atol=0)
    assert ready[:3] == [True] * 3
    assert all(layer._prepared is None for layer in layers(model))


def test_without_autocast_every_layer_prepares_its_own(together):
    model = small()
    ready = seen(model)
    model(images())
    assert ready == [False] * 3


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.weight.data.mul_(2),
        lambda layer: layer.mask.logical_not_(),
        lambda layer: layer.set_mask(torch.ones(layer.weight.shape[0], 1, 1, 1) > 0),
        lambda layer: setattr(layer.weight, "data", layer.weight.data * 2),
        lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach() + 1)),
    ],
    ids=["data", "mask", "new-mask", "moved", "new-weight"],
)
def test_a_forward_sees_every_change(together, change):
    model, x = small(), images()
    run(model, x)
    for layer in layers(model):
        change(layer)
    torch.testing.assert_close(run(model, x), apart(model, x), rtol=0, atol=0)


def test_two_forwards_of_the_same_weights_share_a_backward(together):
    model, x = small(), images()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().sum() + model(x).float().sum()
    loss.backward()
    assert all(layer.weight.grad.abs().sum() > 0 for layer in layers(model))


def test_a_backward_after_the_weights_changed_fails(together):
    model, x = small(), images()
    with torch.autocast("cpu", torch.bfloat16):
        old = model(x.requires_grad_()).float().sum()
        with torch.no_grad():
            layers(model)[2].weight.mul_(2)
        model(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.backward()


def test_a_layer_finds_the_lists_of_its_paths(together):
    model, x = small(), images()
    layer = layers(model)[2]
    found = []
    layer.register_forward_pre_hook(lambda m, _: found.append(m._prepared))
    layer._paths_for[4, 16, 5, 5] = ("sparse", "skip", "cudnn")
    run(model, x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(x)
    before, inference = found
    wanted = {
        ("sparse", False): sparse_columns(before.weight),
        ("skip", True): live_tiles(before.turned),
    }
    assert before.lists.keys() == wanted.keys()
    assert all(torch.equal(before.lists[key], wanted[key]) for key in wanted)
    assert inference.lists.keys() == {("sparse", False)}  # there is no gradient to come


def test_forward_and_weight_gradient_share_the_words_of_the_mask(together):
    model, x = small(), images()
    layer = layers(model)[2]
    found = []
    layer.register_forward_pre_hook(lambda m, _: found.append(m._prepared))
    layer._paths_for[4, 16, 5, 5] = ("skip", "cudnn", "skip")
    with torch.no_grad():
        layer.weight.zero_()
    run(model, x)
    layer.weight.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    training, frozen = (prepared.lists for prepared in found)
    assert training.keys() == frozen.keys() == {("skip", False)}
    assert torch.equal(training["skip", False], live_tiles(layer.mask))
    assert not frozen["skip", False].any()  # of the weight, all of which is zero


def test_nothing_is_left_after_an_error(together):
    model = small()
    model.append(nn.Linear(3, 3))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):
        model(images())
    assert all(layer._prepared is None for layer in layers(model))


def test_copies_have_their_own(together):
    model, x = small(), images()
    run(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            layers(other)[0].weight.mul_(3)
        torch.testing.assert_close(run(other, x), apart(other, x), rtol=0, atol=0)
        torch.testing.assert_close(run(model, x), apart(model, x), rtol=0, atol=0)


def test_the_plan_dies_with_its_model(together):
    before = len(_prepare._plans)
    model = small()
    run(model, images())
    assert len(_prepare._plans) == before + 1
    del model
    assert len(_prepare._plans) == before


def test_a_folded_model_is_plain(together):
    model = fold(small())
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert not model._forward_hooks_always_called


def test_compiles_without_a_break(together):
    torch._dynamo.reset()
    model, x = small(), images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.gpu
def test_together_on_a_gpu():
    model, x = small("cuda"), images("cuda")
    ready = seen(model)
    torch.testing.assert_close(run(model, x, "cuda"), apart(model, x, "cuda"), rtol=1e-2, atol=1e-2)
    assert ready[:3] == [True] * 3


@pytest.mark.gpu
def test_a_replay_reads_the_masks_of_its_moment():
    model, x = small("cuda"), images("cuda")

    def forward():
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return model(x)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            forward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward()
    for _ in range(3):
        for layer in layers(model):
            layer.mask.copy_(torch.rand_like(layer.weight) < 0.5)
            layer.weight.data.add_(0.1)
        graph.replay()
        replayed = out.clone()
        torch.testing.assert_close(replayed, forward(), rtol=1e-2, atol=1e-2)
