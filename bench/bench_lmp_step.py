"""Whole steps of learnable mask pruning, against dense training and hidden-networks.

The peers are in lmp_peers.py. Medians of the GPU's time; all rows run in one process, one after the
other, so that ratios are of one machine. On a CPU a small case shows that all of them run.
"""

from __future__ import annotations

import gc

import pytest
import torch
from lmp_peers import PEERS

from rtk.models import ModelSpec, create

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPARSITY = 0.9
# arch, stem, width, image size, batch
CASES = {"r18-8px-32": ("resnet18", "3x3", 0.125, 8, 32)}
if DEVICE == "cuda":
    CASES = {
        "r18-32px-128": ("resnet18", "3x3", 1.0, 32, 128),
        "r50-224px-128": ("resnet50", "7x7", 1.0, 224, 128),
    }
_medians: dict[tuple[str, str], float] = {}


@pytest.fixture(autouse=True)
def _one_thread():
    """Of a CPU: threads of so small a network wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", CASES)
def bench_lmp_step(case, peer, measure, benchmark):
    arch, stem, width, size, batch = CASES[case]
    benchmark.group = f"LMP step {case} {DEVICE}"
    torch.manual_seed(0)
    gc.collect()  # the graphs of the rows before
    before = 0
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    model = create(ModelSpec(arch, stem, width, 1000, (0.5,) * 3, (0.25,) * 3)).to(DEVICE)
    if DEVICE == "cuda":
        model.to(memory_format=torch.channels_last)
    step = PEERS[peer](model.train(), SPARSITY)
    format = torch.channels_last if DEVICE == "cuda" else torch.contiguous_format
    batches = [
        (
            torch.rand(batch, 3, size, size, device=DEVICE).to(memory_format=format),
            torch.randint(1000, (batch,), device=DEVICE),
        )
        for _ in range(4)
    ]
    for i in range(8):  # tunes, captures
        loss = step(*batches[i % 4])
    turn = iter(range(10**9))
    measure(lambda: step(*batches[next(turn) % 4]), device=DEVICE)
    median = _medians[case, peer] = benchmark.stats.stats.median
    benchmark.extra_info["images_per_s"] = round(batch / median)
    if DEVICE == "cuda":
        peak = torch.cuda.max_memory_allocated() - before
        benchmark.extra_info["peak_gib"] = round(peak / 2**30, 2)
        assert peer not in ("rtk", "dense-graphed") or step.captured
    for other in PEERS:
        if (case, other) in _medians:
            benchmark.extra_info[f"times_{other}"] = round(_medians[case, other] / median, 3)
    print(f"{case} {peer}: {1e3 * median:.2f} ms, {batch / median:.0f} images/s")
    assert loss.isfinite()
    if peer == "rtk":
        kept = sum(int(mask.sum()) for mask in step.masks.values())
        wanted = (m.numel() - round(SPARSITY * m.numel()) for m in step.masks.values())
        assert kept == sum(wanted)
