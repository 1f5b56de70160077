"""Masked convolutions against `F.conv2d(x, w * m)` and cuDNN on ready masked weights.

Three parts, of which each can be run alone:

    pytest bench/bench_masked_conv2d.py -k table --benchmark-json=bench/results/GPU/FILE.json
    pytest bench/bench_masked_conv2d.py -k sweep -s
    pytest bench/bench_masked_conv2d.py -k networks -s

- table: nine shapes with block-64 masks, each way, through pytest-benchmark: eager, with a cold L2
  cache, one layer at a time, so that rtk's forward pays for preparing weights, and for the input
  gradient's lists, by launches that in a model serve all layers.
- sweep: every shape, granularity and density, see masked_conv2d_sweep.py.
- networks: whole ResNets, see masked_conv2d_networks.py.

The last two fill one JSON table each, bench/results/<gpu>/masked_conv2d.json and
masked_conv2d_networks.json; a table that is there is gone on with. The environment can say:

    RTK_BENCH_RESULTS   the folder to write to
    RTK_BENCH_SECONDS   begin no case after this time; the next run goes on
    RTK_BENCH_ONLY      a regular expression: cases in whose name it is found, e.g. block-64/0.1

On a CPU a few tiny cases run, to see that they do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from masked_conv2d_layers import (
    WAYS,
    Shape,
    amp,
    assert_right,
    ours,
    plain_masked,
    random_mask,
    ready,
)
from masked_conv2d_networks import networks_of
from masked_conv2d_sweep import WHAT, sweep
from masked_conv2d_table import RESULTS, Table, machine

import rtk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [
    Shape(128, 64, 64, 56, 3),
    Shape(128, 128, 128, 28, 3),
    Shape(128, 256, 256, 14, 3),
    Shape(128, 512, 512, 7, 3),
    Shape(512, 512, 512, 4, 3),
    Shape(128, 256, 64, 56, 1),
    Shape(128, 64, 256, 56, 1),
    Shape(128, 1024, 256, 14, 1),
    Shape(128, 512, 2048, 7, 1),
]
PEERS = ("ready", "masked", *(f"rtk-{d}" for d in (1, 0.5, 0.25, 0.1, 0.05)))
if DEVICE == "cpu":
    SHAPES, PEERS = [Shape(2, 8, 16, 6, 3)], ("ready", "masked", "rtk-0.5")


@pytest.fixture(autouse=True)
def _fastest_cudnn_and_no_times_of_other_runs(monkeypatch, tmp_path) -> Iterator[None]:
    monkeypatch.setenv("RTK_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        yield


def _table(name: str, what: str, tmp_path: Path) -> Table:
    folder = os.environ.get("RTK_BENCH_RESULTS")
    known = tmp_path if DEVICE == "cpu" else RESULTS / machine(DEVICE)
    seconds = float(os.environ.get("RTK_BENCH_SECONDS", "0"))
    return Table((Path(folder) if folder else known) / name, what, DEVICE, seconds)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_table(shape, way, peer, measure, benchmark):
    benchmark.group = f"masked_conv2d {way} {shape.n} {shape}"
    is_rtk = peer.startswith("rtk")
    density = float(peer.removeprefix("rtk-")) if is_rtk else 0.1
    mask = random_mask(shape, "block-64", density, DEVICE)
    x = shape.input(DEVICE)
    if is_rtk:
        model = ours(shape, mask, DEVICE, count=1)
        if DEVICE == "cuda":
            benchmark.extra_info["taken"] = rtk.nn.tune(model, x)[0].taken
        assert_right(model, shape, mask, DEVICE)
    else:
        model = (ready if peer == "ready" else plain_masked)(
            shape, mask=mask, device=DEVICE, count=1
        )
    weight = model.layers[0].weight
    leaf = x if way == "input" else weight
    x.requires_grad_(way == "input")
    weight.requires_grad_(way == "weight")
    with torch.no_grad(), amp(DEVICE):
        grad = torch.randn_like(model(x)[0])
    outs = []

    def forward() -> None:
        with torch.set_grad_enabled(way != "forward"), amp(DEVICE):
            outs[:] = model(x)

    def backward() -> None:
        torch.autograd.grad(outs[0], leaf, grad)

    measure(
        forward if way == "forward" else backward,
        setup=None if way == "forward" else forward,
        flops=2 * grad.numel() * shape.c * shape.taps**2,  # of the dense layer
        bytes=sum(t.numel() * t.element_size() for t in (x, grad)) + 2 * weight.numel(),
        device=DEVICE,
    )


def bench_sweep(tmp_path):
    table = _table("masked_conv2d.json", WHAT, tmp_path)
    try:
        sweep(table, DEVICE, os.environ.get("RTK_BENCH_ONLY", ""))
    finally:
        table.save()
    table.assert_whole()


def bench_networks(tmp_path):
    what = "Whole ResNets, milliseconds a call, bf16; see bench/masked_conv2d_networks.py"
    table = _table("masked_conv2d_networks.json", what, tmp_path)
    for name, run in networks_of(DEVICE):
        if not re.search(os.environ.get("RTK_BENCH_ONLY", ""), name):
            continue
        row = table.measure(name, run)
        print(name, row, flush=True)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    table.assert_whole()
