"""topk_mask on the convolutions of ResNet-18 (11.2 M scores), against what users write by hand."""

from __future__ import annotations

import pytest
import torch

import rtk

SHAPES = [
    *[(64, 64, 3, 3)] * 4,
    (128, 64, 3, 3),
    *[(128, 128, 3, 3)] * 3,
    (256, 128, 3, 3),
    *[(256, 256, 3, 3)] * 3,
    (512, 256, 3, 3),
    *[(512, 512, 3, 3)] * 3,
]
KEEP = 0.1


def _torch_topk(scores: list[torch.Tensor], k: list[int]) -> list[torch.Tensor]:
    masks = []
    for tensor, kept in zip(scores, k, strict=True):
        mask = torch.zeros(tensor.numel(), dtype=torch.bool)
        mask[tensor.flatten().topk(kept, sorted=False).indices] = True
        masks.append(mask.view_as(tensor))
    return masks


def _sort(scores: list[torch.Tensor], k: list[int]) -> list[torch.Tensor]:
    """As hidden-networks does: sort every layer."""
    masks = []
    for tensor, kept in zip(scores, k, strict=True):
        mask = torch.zeros(tensor.numel(), dtype=torch.bool)
        mask[tensor.flatten().sort(descending=True).indices[:kept]] = True
        masks.append(mask.view_as(tensor))
    return masks


@pytest.mark.benchmark(group="topk_mask resnet18")
@pytest.mark.parametrize("peer", ["rtk", "torch.topk", "torch.sort"])
def bench_topk_mask(peer, measure):
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(shape, generator=generator) for shape in SHAPES]
    k = [round(KEEP * tensor.numel()) for tensor in scores]
    function = {"rtk": rtk.ops.topk_mask, "torch.topk": _torch_topk, "torch.sort": _sort}[peer]
    masks = measure(lambda: function(scores, k), bytes=5 * sum(s.numel() for s in scores))
    assert [int(mask.sum()) for mask in masks] == k
