"""tune: the choice between a masked convolution's paths, and what is kept of it."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import rtk
from rtk.errors import RtkError
from rtk.nn import LayerTimes, MaskedConv2d, MaskedLinear, _path_times, mask_model, tune
from rtk.nn._graph_ms import graph_ms
from rtk.nn._layer_times import TimesFile
from rtk.nn._linear_times import linear_times
from rtk.ops import prepare_weight
from rtk.ops._registry import ops

_tune = importlib.import_module("rtk.nn.tune")  # the package's name of it is the function


def test_a_model_on_a_cpu_is_refused():
    with pytest.raises(RtkError, match=r"the model is on cpu.*model\.cuda"):
        tune(nn.Sequential(MaskedConv2d(3, 4, 3)), torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("times", "taken"),
    [
        ({"skip": (0.96, 0.98, 1.9)}, ("skip", "cudnn", "skip")),  # 3 % faster, or not worth it
        ({"skip": (None, None, None)}, ("cudnn", "cudnn", "cudnn")),
        ({"skip": (0.9, 0.5, 2.0), "sparse": (0.8, 0.6, None)}, ("sparse", "skip", "cudnn")),
        ({"skip": (None, None, 1.0), "sparse": (0.8, None, None)}, ("sparse", "cudnn", "skip")),
    ],
)
def test_what_is_faster_is_taken(times, taken):
    times = LayerTimes("layer", (1, 64, 8, 8), 0.1, {"cudnn": (1.0, 1.0, 2.0), **times})
    assert times.taken == taken


def test_a_linear_layer_has_cublas_to_beat():
    times = {"blocks64": (0.9, 0.98, None), "cublas": (1.0, 1.0, 2.0), "blocks32": (0.8, 1.1, 1.0)}
    times = LayerTimes("layer", (8, 64), 0.1, times)
    assert times.taken == ("blocks32", "cublas", "blocks32")
    assert times.taken_eagerly == times.taken  # saves 1.2 ms
    assert times.dense == "cublas"


@pytest.mark.parametrize(
    ("skip", "taken"),
    [((0.9, 0.5, 0.7), ("skip", "skip", "skip")), ((0.9, 0.7, 0.8), ("cudnn",) * 3)],
)
def test_eagerly_a_layer_must_save_what_its_python_costs(skip, taken):
    dense = (1.0, 1.0, 1.0)
    times = LayerTimes("layer", (1, 64, 8, 8), 0.1, {"cudnn": dense, "skip": skip})
    assert times.taken == ("skip", "skip", "skip")
    assert times.taken_eagerly == taken


def on_cpu(monkeypatch, timed: list[tuple[float, ...]]) -> None:
    """Let every kernel be there, and let the clock note how many calls it saw and their limit."""

    def clock(calls, *, enough=float("inf")):
        calls(2)
        timed.append((1.0 + len(timed), enough))
        return timed[-1][0]

    monkeypatch.setattr(_path_times, "graph_ms", clock)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    for name in ("conv2d_bwd_weight_live", "block_matmul"):
        choose = ops[name].choose

        def choose_triton(*args, choose=choose):
            return replace(choose(*args), backend="triton")

        monkeypatch.setattr(ops[name], "choose", choose_triton)


ALL = {(path, way) for path in ("skip", "sparse") for way in range(3)}
BLOCKS = {(path, way) for path in ("blocks128", "blocks64", "blocks32") for way in range(3)}


def of(path: str) -> set[tuple[str, int]]:
    return {(path, way) for way in range(3)}


@pytest.mark.parametrize(
    ("size", "last", "bool_mask", "none"),
    [
        ((64, 64, 3, 3), True, True, {("sparse", 2)} | BLOCKS),
        ((64, 64, 3, 3), False, True, {("sparse", 2), ("skip", 2)} | BLOCKS),
        ((64, 8, 1, 1), True, True, {("sparse", 2), ("skip", 0), ("skip", 1)} | BLOCKS),
        ((64, 64, 1, 1), True, True, {("sparse", 2)} | of("blocks128")),
        ((64, 96, 1, 1), True, True, {("sparse", 2), ("skip", 0), ("skip", 1)}
         | of("blocks128") | of("blocks64")),
        ((64, 64, 3, 3), True, False, ALL | BLOCKS),
        ((64, 64, 1, 1), True, False, ALL | BLOCKS),
    ],
)  # fmt: skip
def test_every_path_that_can_be_is_timed(size, last, bool_mask, none, monkeypatch):
    timed: list[tuple[float, ...]] = []
    on_cpu(monkeypatch, timed)
    layer = MaskedConv2d(size[1], size[0], size[2], padding=size[2] // 2, bias=False)
    layer.set_mask(torch.rand(size) < 0.5 if bool_mask else torch.rand(size))
    if last:
        layer.to(memory_format=torch.channels_last)
    with torch.no_grad():
        ready = prepare_weight(layer.weight, layer.mask, dtype=torch.bfloat16, channels_last=True)
        shares = {"skip": 0.5, "blocks64": 0.5, "blocks32": 0.25}
        times = _path_times.path_times(layer, ready, (2, size[1], 5, 4), shares)
    paths = ["skip", "sparse", "blocks128", "blocks64", "blocks32"]
    assert list(times) == ["cudnn", *paths]
    assert {(p, way) for p in times for way in range(3) if times[p][way] is None} == none
    assert times["cudnn"] == (1.0, 2.0, 3.0)
    limits = [2 * times["cudnn"][way] for p in paths for way in range(3) if (p, way) not in none]
    assert [limit for _, limit in timed] == [float("inf")] * 3 + limits


@pytest.mark.parametrize(
    ("shares", "timed"),
    [
        ({"blocks128": 0.1, "blocks64": 0.1, "blocks32": 0.1}, {"blocks128"}),
        ({"blocks128": 0.34, "blocks64": 0.1, "blocks32": 0.1}, {"blocks128", "blocks64"}),
        ({"blocks128": 0.8, "blocks64": 0.34, "blocks32": 0.1}, {"blocks64", "blocks32"}),
        ({"blocks128": 1.0, "blocks64": 1.0, "blocks32": 1.0}, set()),
        ({"blocks32": 0.5}, {"blocks32"}),
    ],
)
def test_only_blocks_that_may_win_are_timed(shares, timed):
    found = {path for path in shares if not _path_times.is_hopeless(path, shares)}
    assert found == timed and not _path_times.is_hopeless("sparse", shares)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["bool", "column", "floating"])
def test_every_path_of_a_linear_layer_is_timed(kind, bias, monkeypatch):
    timed: list[tuple[float, ...]] = []
    on_cpu(monkeypatch, timed)
    layer = MaskedLinear(64, 128, bias=bias)
    layer.set_mask(torch.rand(128, 1 if kind == "column" else 64) < 0.5)
    if kind == "floating":
        layer.set_mask(layer.mask.float())
    with torch.no_grad():
        ready = prepare_weight(layer.weight, layer.mask, dtype=torch.bfloat16)
        times = linear_times(layer, ready, (2, 3, 64), {"blocks64": 0.5, "blocks32": 0.25})
    assert list(times) == ["cublas", "blocks128", "blocks64", "blocks32"]
    assert times["cublas"] == (1.0, 2.0, 3.0) and times["blocks128"] == (None,) * 3
    untimed = [times[path] == (None,) * 3 for path in ("blocks64", "blocks32")]
    assert untimed == [kind == "floating"] * 2
    limits = [] if kind == "floating" else [2.0, 4.0, 6.0] * 2
    assert [limit for _, limit in timed] == [float("inf")] * 3 + limits


@pytest.mark.parametrize(
    "make",
    [lambda: MaskedConv2d(64, 128, 1, bias=False), lambda: MaskedLinear(64, 128)],
    ids=["conv", "linear"],
)
def test_what_was_measured_is_known_the_next_time(make, tmp_path, monkeypatch):
    timed: list[tuple[float, ...]] = []
    on_cpu(monkeypatch, timed)
    monkeypatch.setenv("RTK_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    layer = make().to(memory_format=torch.channels_last)
    mask = torch.zeros_like(layer.weight, dtype=torch.bool)
    mask[:32, :32] = torch.rand_like(layer.weight[:32, :32]) < 0.5
    layer.set_mask(mask)
    shape = (2, 64, 3, 3) if isinstance(layer, MaskedConv2d) else (5, 64)
    results, measured = [], []
    for _ in range(2):
        file = TimesFile(torch.device("cpu"))
        with torch.no_grad():
            results.append(_tune._times(layer, "layer", shape, file))
        file.save()
        measured.append(len(timed))
    assert 0 < measured[0] == measured[1] and results[0] == results[1]
    times, shares = results[0]
    assert shares == {"skip": 0.5, "blocks64": 0.5, "blocks32": 1 / 8}
    assert times.live == 0.5 and times.times["blocks32"][0] is not None
    layer.set_mask(torch.ones_like(mask))
    dense = layer.weight.detach().bfloat16()
    assert file.get(_tune._key(layer, dense, {"skip": 1.0}), "layer", shape) is None


@pytest.mark.gpu
def test_the_clock_gives_up_what_is_slow():
    counts: list[int] = []
    x = torch.ones(1000, device="cuda")

    def calls(count: int) -> None:
        counts.append(count)
        for _ in range(count):
            x.add_(1)

    assert graph_ms(calls, enough=0.0) > 0 and max(counts) == 3
    assert graph_ms(calls, enough=1e9) > 0 and max(counts) == 10


def one_block() -> torch.Tensor:
    mask = torch.zeros(256, 256, 3, 3, dtype=torch.bool)
    mask[:64, :64, 0, 0] = True
    return mask


def scattered() -> torch.Tensor:
    return torch.rand(256, 256, 3, 3) < 0.01


def network(mask: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
    layers = [nn.Conv2d(256, 256, 3, padding=1, bias=False) for _ in range(2)]
    model = nn.Sequential(*layers).cuda().to(memory_format=torch.channels_last).eval()
    mask_model(model, rtk.Ticket({"0": mask, "1": mask.clone()}))
    x = torch.randn(64, 256, 14, 14, device="cuda").contiguous(memory_format=torch.channels_last)
    return model, x


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("mask", "live", "paths"),
    [(one_block(), 1 / 144, {"skip", "sparse"}), (scattered(), 1, {"sparse"})],
    ids=["block", "scattered"],
)
def test_layers_take_what_pays_and_give_the_same(mask, live, paths, tmp_path, monkeypatch):
    monkeypatch.setenv("RTK_CACHE", str(tmp_path))
    model, x = network(mask)

    def run():
        leaf = x.clone().requires_grad_()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = model(leaf)
        return out.float(), *torch.autograd.grad(out.float().sum(), [leaf, *model.parameters()])

    before = run()
    found = tune(model, x)
    assert [times.layer for times in found] == ["0", "1"]
    assert all(times.live == pytest.approx(live) for times in found)
    blocks = {"blocks128", "blocks64", "blocks32"}
    assert all(times.times.keys() == {"cudnn", "skip", "sparse"} | blocks for times in found)
    assert all(times.times[path] == (None,) * 3 for times in found for path in blocks)
    assert any(paths & set(times.taken[:2]) for times in found)
    assert all(times.times["sparse"][2] is None for times in found)
    assert any(times.taken[2] == "skip" for times in found) == (live < 1)
    torch.testing.assert_close(run(), before, rtol=2e-2, atol=2e-2)
    assert json.loads((tmp_path / "conv-times.json").read_text())
    assert tune(model, x) == found  # from the file


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["skip", "sparse"])
def test_a_replay_reads_the_masks_of_its_moment(path):
    model, x = network(scattered())
    for layer in model:
        layer._paths_for[tuple(x.shape)] = (path, path, "skip")
        layer._eager_paths_for = layer._paths_for  # so that kernels are compiled before the capture

    def step() -> tuple[torch.Tensor, ...]:
        leaf = x.detach().requires_grad_()
        with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
            out = model(leaf)
        return out, *torch.autograd.grad(out.float().square().sum(), [leaf, *model.parameters()])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for density in (0.03, 0.5):
        for layer in model:
            layer.mask.copy_(torch.rand(layer.mask.shape) < density)
            layer.weight.data.normal_(std=(256 * 9 * density) ** -0.5)
        graph.replay()
        replayed = [t.clone() for t in captured]
        for layer in model:
            layer._paths_for.clear()
        for mine, wanted in zip(replayed, step(), strict=True):
            scale = wanted.float().abs().max().item()
            torch.testing.assert_close(mine, wanted, rtol=3e-2, atol=2e-2 * scale)
        for layer in model:
            layer._paths_for[tuple(x.shape)] = (path, path, "skip")


def products(device: str, block: int = 64, density: float = 0.1) -> tuple[nn.Module, torch.Tensor]:
    """Return two 1x1 convolutions with a linear layer behind, under a ticket of blocks."""
    layers = [nn.Conv2d(512, 1024, 1, bias=False), nn.LeakyReLU(0.99, inplace=True)]
    layers.append(nn.Conv2d(1024, 512, 1))
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(8192, 1024))
    model = model.to(device, memory_format=torch.channels_last).eval()
    masks = {}
    for name in ("0", "2", "5"):
        weight = model.get_submodule(name).weight
        live = torch.rand(weight.shape[0] // block, weight.shape[1] // block) < density
        mask = live.repeat_interleave(block, 0).repeat_interleave(block, 1)
        masks[name] = mask.view(weight.shape)
    mask_model(model, rtk.Ticket(masks))
    x = torch.randn(128, 512, 14, 14, device=device)
    return model, x.contiguous(memory_format=torch.channels_last)


def run_step(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaf = x.detach().requires_grad_()
    with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
        out = model(leaf)
    return out, *torch.autograd.grad(out.float().square().sum(), [leaf, *model.parameters()])


def assert_alike(mine: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> None:
    for one, other in zip(mine, wanted, strict=True):
        scale = other.float().abs().max().item()
        torch.testing.assert_close(one.float(), other.float(), rtol=3e-2, atol=2e-2 * scale)


@pytest.mark.gpu
@pytest.mark.parametrize("block", [32, 64, 128])
def test_layers_that_are_products_take_blocks(block, tmp_path, monkeypatch):
    monkeypatch.setenv("RTK_CACHE", str(tmp_path))
    model, x = products("cuda", block)
    before = run_step(model, x)
    found = tune(model, x)
    assert [times.layer for times in found] == ["0", "2", "5"]
    taken = {path for times in found for path in times.taken}
    assert any(path.startswith("blocks") for path in taken), [times.times for times in found]
    for layer in (model[0], model[2], model[5]):
        layer._eager_paths_for = layer._paths_for
    assert_alike(run_step(model, x), before)
    assert tune(model, x) == found  # from the file


@pytest.mark.gpu
@pytest.mark.parametrize("block", [32, 64, 128])
def test_a_replay_of_products_reads_the_masks_of_its_moment(block):
    model, x = products("cuda", block)
    layers = [model[0], model[2], model[5]]
    shapes = [(128, 512, 14, 14), (128, 1024, 14, 14), (128, 8192)]

    def choose(path: str) -> None:
        for layer, shape in zip(layers, shapes, strict=True):
            dense = "cublas" if isinstance(layer, MaskedLinear) else "cudnn"
            layer._paths_for[shape] = (dense if path == "dense" else path,) * 3
            layer._eager_paths_for = layer._paths_for

    choose(f"blocks{block}")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run_step(model, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_step(model, x)
    for density in (0.0, 0.05, 1.0):  # no blocks, but for the last
        for layer in layers:
            layer.mask.copy_(torch.rand(layer.mask.shape) < density)
            layer.weight.data.normal_(std=(layer.weight.shape[1] * max(density, 0.01)) ** -0.5)
        graph.replay()
        replayed = tuple(t.clone() for t in captured)
        choose("dense")
        assert_alike(replayed, run_step(model, x))
        choose(f"blocks{block}")
