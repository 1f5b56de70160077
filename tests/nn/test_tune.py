"""tune: the choice between skipping dead blocks and cuDNN, and what is kept of it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import rtk
from rtk.errors import RtkError
from rtk.nn import LayerTimes, MaskedConv2d, mask_model, tune


def test_a_model_on_a_cpu_is_refused():
    with pytest.raises(RtkError, match=r"the model is on cpu.*model\.cuda"):
        tune(nn.Sequential(MaskedConv2d(3, 4, 3)), torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("times", "taken"),
    [
        ({"skip": (0.96, 0.98)}, ("skip", "cudnn")),  # 3 % faster, or it is not worth it
        ({"skip": (None, None)}, ("cudnn", "cudnn")),
        ({"skip": (0.9, 0.5), "sparse": (0.8, 0.6)}, ("sparse", "skip")),
        ({"skip": (None, None), "sparse": (0.8, None)}, ("sparse", "cudnn")),
    ],
)
def test_what_is_faster_is_taken(times, taken):
    times = LayerTimes("layer", (1, 64, 8, 8), 0.1, {"cudnn": (1.0, 1.0), **times})
    assert times.taken == taken


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
    assert any(paths & set(times.taken) for times in found)
    torch.testing.assert_close(run(), before, rtol=2e-2, atol=2e-2)
    assert json.loads((tmp_path / "conv-times.json").read_text())
    assert tune(model, x) == found  # from the file


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["skip", "sparse"])
def test_a_replay_reads_the_masks_of_its_moment(path):
    model, x = network(scattered())
    for layer in model:
        layer._paths_for[tuple(x.shape)] = (path, path)

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
            layer._paths_for[tuple(x.shape)] = (path, path)
