"""Whole adversarial training steps (PGD, attack and update) against what people use and write.

The peers are in attack_peers.py. Medians of the GPU's time; all rows run in one process, one after
the other, so that ratios are of one machine.
"""

from __future__ import annotations

import gc

import pytest
import torch
from attack_peers import OURS, PEERS, network

import rtk

# arch, stem, image size, batch, PGD steps
CASES = {
    "r18-32px-128": ("resnet18", "3x3", 32, 128, 7),
    "r18-32px-512": ("resnet18", "3x3", 32, 512, 7),
    "r50-224px-128": ("resnet50", "7x7", 224, 128, 3),
}
_medians: dict[tuple[str, str], float] = {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", CASES)
def bench_attack(case, peer, measure, benchmark):
    arch, stem, size, batch, steps = CASES[case]
    benchmark.group = f"adversarial training step {case}, PGD-{steps}"
    torch.manual_seed(0)
    gc.collect()  # the graphs of the rows before
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()  # here: a graph takes its memory when it is captured
    before = torch.cuda.memory_allocated()
    model = network(arch, stem, 1000, ours=peer in OURS)
    model = model.cuda().to(memory_format=torch.channels_last).train()
    hyper = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}
    optimizer = torch.optim.SGD(model.parameters(), **hyper, fused=True)
    attack = rtk.attacks.PGD(eps=4 / 255, step_size=8 / 255 / 3, steps=steps)
    step = PEERS[peer](model, optimizer, attack)
    batches = [
        (
            torch.rand(batch, 3, size, size, device="cuda").to(memory_format=torch.channels_last),
            torch.randint(1000, (batch,), device="cuda"),
        )
        for _ in range(4)
    ]
    for i in range(8):  # compiles, tunes, captures
        loss = step(*batches[i % 4])
    turn = iter(range(10**9))
    measure(lambda: step(*batches[next(turn) % 4]), device="cuda")
    median = _medians[case, peer] = benchmark.stats.stats.median
    benchmark.extra_info["images_per_s"] = round(batch / median)
    benchmark.extra_info["peak_gib"] = round(
        (torch.cuda.max_memory_allocated() - before) / 2**30, 2
    )
    for other in PEERS:
        if (case, other) in _medians:
            benchmark.extra_info[f"times_{other}"] = round(_medians[case, other] / median, 3)
    print(f"{case} {peer}: {1e3 * median:.2f} ms, {batch / median:.0f} images/s")
    assert loss.isfinite()
