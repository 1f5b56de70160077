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
    ("cudnn", "skip", "skips"),
    [
        ((1.0, 1.0), (0.96, 0.98), (True, False)),  # 3 % faster, or it is not worth it
        ((1.0, 1.0), (None, None), (False, False)),
    ],
)
def test_what_is_faster_is_taken(cudnn, skip, skips):
    assert LayerTimes("layer", (1, 64, 8, 8), 0.1, cudnn, skip).skips == skips


@pytest.mark.gpu
def test_layers_skip_where_it_pays_and_give_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("RTK_CACHE", str(tmp_path))
    torch.manual_seed(0)
    layers = [nn.Conv2d(256, 256, 3, padding=1, bias=False) for _ in range(2)]
    model = nn.Sequential(*layers).cuda().to(memory_format=torch.channels_last).eval()
    mask = torch.zeros(256, 256, 3, 3, dtype=torch.bool)
    mask[:64, :64, 0, 0] = True
    mask_model(model, rtk.Ticket({"0": mask, "1": mask.clone()}))
    x = torch.randn(64, 256, 14, 14, device="cuda").contiguous(memory_format=torch.channels_last)

    def run():
        leaf = x.clone().requires_grad_()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = model(leaf)
        return out.float(), *torch.autograd.grad(out.float().sum(), [leaf, *model.parameters()])

    before = run()
    found = tune(model, x)
    assert [times.layer for times in found] == ["0", "1"]
    assert all(times.live == pytest.approx(1 / 144) for times in found)
    assert any(any(times.skips) for times in found)
    torch.testing.assert_close(run(), before, rtol=2e-2, atol=2e-2)
    assert json.loads((tmp_path / "conv-times.json").read_text())
    assert tune(model, x) == found  # from the file
