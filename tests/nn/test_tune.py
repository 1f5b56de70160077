"""tune: the choice between a masked convolution's paths, and what is kept of it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import rtk
from rtk.errors import RtkError
from rtk.nn import LayerTimes, MaskedConv2d, _path_times, mask_model, tune
from rtk.nn._graph_ms import graph_ms
from rtk.ops import prepare_weight
from rtk.ops._registry import ops


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
    choose = ops["conv2d_bwd_weight_live"].choose
    monkeypatch.setattr(
        ops["conv2d_bwd_weight_live"],
        "choose",
        lambda *args: replace(choose(*args), backend="triton"),
    )


@pytest.mark.parametrize(
    ("size", "last", "bool_mask", "none"),
    [
        ((64, 64, 3, 3), True, True, {("sparse", 2)}),
        ((64, 64, 3, 3), False, True, {("sparse", 2), ("skip", 2)}),
        ((64, 8, 1, 1), True, True, {("sparse", 2), ("skip", 0), ("skip", 1)}),
        ((64, 64, 3, 3), True, False, {(p, w) for p in ("skip", "sparse") for w in range(3)}),
    ],
)
def test_every_path_that_can_be_is_timed(size, last, bool_mask, none, monkeypatch):
    timed: list[tuple[float, ...]] = []
    on_cpu(monkeypatch, timed)
    layer = MaskedConv2d(size[1], size[0], size[2], padding=size[2] // 2, bias=False)
    layer.set_mask(torch.rand(size) < 0.5 if bool_mask else torch.rand(size))
    if last:
        layer.to(memory_format=torch.channels_last)
    with torch.no_grad():
        ready = prepare_weight(layer.weight, layer.mask, dtype=torch.bfloat16, channels_last=True)
        times = _path_times.path_times(layer, ready, (2, size[1], 5, 4), 0.5)
    assert list(times) == ["cudnn", "skip", "sparse"]
    assert {(p, way) for p in times for way in range(3) if times[p][way] is None} == none
    assert times["cudnn"] == (1.0, 2.0, 3.0)
    limits = [2 * times["cudnn"][way] for p in ("skip", "sparse") for way in range(3)
              if (p, way) not in none]  # fmt: skip
    assert [limit for _, limit in timed] == [float("inf")] * 3 + limits


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
    assert all(times.times.keys() == {"cudnn", "skip", "sparse"} for times in found)
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
